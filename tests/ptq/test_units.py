"""What is learned at once, and which weights can't be learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import apot_fx
from apot_fx import QConfig, QConfigMapping, WeightSpec
from apot_fx.demo.models import ResidualNet, SeparableNet
from apot_fx.ptq.units import BlockUnit, LayerUnit, Unit, find_units
from apot_fx.ptq.weights import find_weights
from apot_fx.values import same_bits
from tests.nets import calibrated, seeded

W3A8 = QConfig.from_preset("w3a8")


def units_of(prepared: nn.Module, order: list[str] | None = None) -> list[Unit]:
    weights, _ = find_weights(prepared)
    return find_units(prepared, weights, order or [w.layer for w in weights.values()])


def names(units: list[Unit]) -> list[list[str]]:
    return [[name.removesuffix(".weight") for name in unit.weights] for unit in units]


def test_residual_blocks_are_found() -> None:
    model = seeded(lambda: ResidualNet(4), (1, 8, 8))
    units = units_of(calibrated(model, [torch.randn(4, 1, 8, 8)], "w4a4"))
    assert names(units) == [
        ["stem.0"],
        ["blocks.0.first.0", "blocks.0.conv"],
        ["blocks.1.first.0", "blocks.1.conv", "blocks.1.shortcut.0"],
        ["blocks.2.first.0", "blocks.2.conv"],
        ["head"],
    ]
    assert [len(unit.ahead) for unit in units] == [2, 3, 0, 1, 0]
    ends = [unit.end for unit in units if isinstance(unit, BlockUnit)]
    assert ends[2].startswith("blocks_1_relu")  # past the add, before the next fake-quant
    assert units[2].name == "blocks.1.first.0 … blocks.1.shortcut.0"


def test_chains_look_two_layers_ahead_in_whatever_config() -> None:
    model = seeded(lambda: SeparableNet(4, depth=2), (1, 8, 8))
    layers = [f"features.{place}.0" for place in range(5)] + ["head"]
    for config in ("w3a3", QConfig(WeightSpec(3))):
        units = units_of(calibrated(model, [torch.randn(4, 1, 8, 8)], config))
        assert names(units) == [[layer] for layer in layers]
        ahead = [[name.removesuffix(".weight") for name in unit.ahead] for unit in units]
        assert ahead == [layers[place + 1 : place + 3] for place in range(6)]


def test_attention_and_feed_forward_are_blocks() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = seeded(lambda: nn.TransformerEncoder(layer, 1))
    x = torch.randn(2, 5, 8)
    prepared = apot_fx.prepare_apot(encoder, W3A8, example_inputs=x)
    apot_fx.calibrate(prepared, [x])
    assert names(units_of(prepared)) == [
        ["layers.0.self_attn.in_proj", "layers.0.self_attn.out_proj"],
        ["layers.0.linear1", "layers.0.linear2"],
    ]


class Dense(nn.Module):
    """No cut from the first layer to the last."""

    def __init__(self, depth: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values: list[torch.Tensor] = [x]
        for layer in self.layers:
            values.append(torch.relu(layer(values[-1])))
        return sum(values)


def test_a_stretch_of_many_layers_is_learned_layer_by_layer_with_its_relu() -> None:
    found = units_of(calibrated(seeded(Dense), [torch.randn(4, 6)], W3A8))
    assert names(found) == [[f"layers.{place}"] for place in range(12)]
    assert all(isinstance(u, BlockUnit) and u.end.startswith("relu") for u in found)


class Twice(nn.Module):
    """One layer at two nodes; two results."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.left(x), self.right(x)


def test_a_layer_at_two_nodes_is_learned_from_both() -> None:
    found = units_of(calibrated(seeded(Twice), [torch.randn(4, 6)], W3A8))
    assert names(found) == [["shared"], ["left"], ["right"]]
    assert [type(unit) for unit in found] == [LayerUnit, BlockUnit, BlockUnit]


def test_a_unit_gives_what_the_model_gives_there() -> None:
    model = seeded(lambda: ResidualNet(4), (1, 8, 8))
    prepared, x = calibrated(model, [torch.randn(4, 1, 8, 8)], "w4a4"), torch.randn(4, 1, 8, 8)
    for unit in units_of(prepared):
        got: list[Any] = []
        gave: list[Any] = []
        with torch.no_grad():
            with unit.watch_inputs(prepared, got.append):
                prepared(x)
            with unit.watch_outputs(prepared, gave.append):
                prepared(x)
            assert len(got) == len(gave) == 1
            assert same_bits(unit.bound(prepared)(got[0]), gave[0]), unit.name


class Odd(nn.Module):
    """Weights that can't be moved: parametrized, tied, read elsewhere, an embedding's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.two.weight = self.one.weight
        self.read, self.plain = nn.Linear(6, 6), nn.Linear(6, 6)
        self.packed = nn.Parameter(torch.randn(12, 6))
        self.idle = nn.Linear(6, 6)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        x = self.two(torch.relu(self.one(torch.relu(self.normed(self.table(rows))))))
        x = self.read(x) + self.read.weight.norm()
        x = nn.functional.linear(x, self.packed[:6]) + x @ self.packed[6:].t()
        return self.plain(x)


def test_what_is_left_has_a_reason() -> None:
    mapping = QConfigMapping().set_global(W3A8).set_module_name("table", W3A8)
    prepared = calibrated(seeded(Odd), [torch.randint(9, (4, 5))], mapping)
    weights, left = find_weights(prepared)
    assert sorted(weights) == ["packed_linear.weight", "packed_linear_0.weight", "plain.weight"]
    assert left["table.weight"].startswith("rows of an embedding")
    assert left["normed.weight"].startswith("it is computed")
    assert left["one.weight"].startswith("tied to two.weight")
    assert left["two.weight"].startswith("tied to one.weight")
    assert left["read.weight"] == "add reads it too, in float"


def test_a_float_embedding_with_the_heads_weight_is_a_reader() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.head(self.table(rows))

    prepared = calibrated(seeded(Tied), [torch.randint(9, (4, 5))], W3A8)
    weights, left = find_weights(prepared)
    assert not weights and left == {"head.weight": "table reads it too, in float"}
