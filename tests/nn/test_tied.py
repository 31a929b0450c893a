"""Layers with one weight have one spec, one α and one packed tensor."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

import apot_fx
from apot_fx import QConfig, QConfigMapping, WeightSpec
from apot_fx.errors import ConfigError
from tests.nn.test_transposed import stages

ROWS, WIDTH = 20, 12
X = torch.randint(0, ROWS, (3, 7))


class Tied(nn.Module):
    """An embedding and a head with its weight: a Linear, or F.linear (``call``).

    ``read``: the weight is read beside both. ``python``: no graph holds the model.
    """

    def __init__(self, call: bool = False, read: bool = False, python: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb, self.mid = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.call, self.read, self.python = call, read, python
        if not call:
            self.head = nn.Linear(WIDTH, ROWS)
            self.head.weight = self.emb.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.python and float(x.sum()) < 0:
            return x
        y = functional.gelu(self.mid(self.emb(x)))
        y = functional.linear(y, self.emb.weight) if self.call else self.head(y)
        return y + self.emb.weight.norm() if self.read else y


class Parts(nn.Module):
    """The embedding is inside a graph, the head outside."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Embedding(ROWS, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        self.head.weight = self.body[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) < 0 else self.head(self.body(x))


MODELS: dict[str, tuple[Any, str, str]] = {
    "layers": (Tied, "emb", "head"),
    "call": (lambda: Tied(call=True), "emb", "emb.linear"),
    "read": (lambda: Tied(read=True), "emb", "head"),
    "call, read": (lambda: Tied(call=True, read=True), "emb", "emb.linear"),
    "python": (lambda: Tied(python=True), "emb", "head"),
    "parts": (Parts, "body.0", "head"),
}


def requested(base: str) -> QConfigMapping:
    return QConfigMapping.from_preset(base).set_object_type(nn.Embedding, "w3")


def row(stage: nn.Module, name: str) -> dict[str, Any]:
    return apot_fx.explain(stage, name).rows[0]


@pytest.mark.parametrize("name", MODELS)
def test_the_heads_spec(name: str) -> None:
    build, emb, head = MODELS[name]
    prepared, converted, _ = stages(build().eval(), requested("w4a4"), X)
    assert "uniform8" in row(prepared, head)["weight"]
    assert row(prepared, emb)["weight"] == row(prepared, head)["weight"]
    both = [prepared.get_submodule(part).weight_fake_quant for part in (emb, head)]
    assert both[0] is both[1]
    for stage in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        packed = [stage.get_submodule(part).weight for part in (emb, head)]
        assert packed[0] is packed[1]
    kept = [key for key in converted.state_dict() if "kept" in key]
    assert len(kept) == ("read" in name)
    prepared.train()(X).square().mean().backward()
    assert both[0].alpha.grad is not None


@pytest.mark.parametrize("name", MODELS)
def test_a_float_head_keeps_its_embedding(name: str) -> None:
    build, emb, head = MODELS[name]
    prepared, _, _ = stages(build().eval(), requested("w4"), X)
    assert row(prepared, head)["form"] == row(prepared, emb)["form"] == "float"
    assert f"{head}'s too" in row(prepared, emb)["why"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("preset", ["w4a4", "w4"])
def test_unasked_embeddings_stay_float(name: str, preset: str) -> None:
    build, emb, head = MODELS[name]
    model = build().eval()
    prepared, converted, _ = stages(model, QConfigMapping.from_preset(preset), X)
    assert "request" in row(prepared, emb)["why"]
    assert (row(prepared, head)["form"] == "quantized") == (preset == "w4a4")
    key = f"{emb}.weight"
    assert torch.equal(converted.state_dict()[key], model.state_dict()[key])


def test_named_alike_is_no_conflict() -> None:
    mapping = QConfigMapping.from_preset("w4")
    mapping.set_module_name("emb", "w3").set_module_name("head", "w3")
    _, converted, _ = stages(Tied().eval(), mapping, X)
    assert converted.emb.weight is converted.head.weight
    table = apot_fx.summary(converted)
    assert {r["layer"] for r in table.rows} == {"emb", "mid", "head"}


@pytest.mark.parametrize("build", [Tied, lambda: Tied(python=True)])
@pytest.mark.parametrize("head", ["w8", None])
def test_conflicts(build: Any, head: str | None) -> None:
    mapping = QConfigMapping.from_preset("w4a4")
    mapping.set_module_name("emb", "w3").set_module_name("head", head)
    model = build()
    with pytest.raises(ConfigError, match="emb and head have one weight"):
        apot_fx.prepare_apot(model, mapping)
    mapping.set_module_name("emb", None)
    assert row(apot_fx.prepare_apot(model, mapping), "emb")["form"] == "float"


def test_two_linears_with_one_weight() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    x = torch.randn(4, 6)
    prepared, converted, _ = stages(model.eval(), QConfigMapping.from_preset("w4a4"), x)
    assert "apot4" in row(prepared, "0")["weight"]  # the later one decides
    assert converted.get_submodule("0").weight is converted.get_submodule("2").weight


def test_weights_untied_later_are_packed_apart() -> None:
    prepared, _, _ = stages(Tied().eval(), requested("w4a4"), X)
    prepared.head.weight = nn.Parameter(prepared.head.weight * 0.5)
    converted = apot_fx.convert_apot(prepared)
    assert converted.emb.weight is not converted.head.weight
    assert apot_fx.check_parity(prepared, converted, [(X,)]).ok


def test_other_layouts_are_packed_apart() -> None:
    """One square Parameter as rows and as columns."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.up = nn.Conv1d(4, 4, 3, padding=1), nn.ConvTranspose1d(4, 4, 3)
            self.up.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(torch.relu(self.one(x)))

    config = QConfigMapping.of(QConfig(WeightSpec(4)))
    prepared, converted, _ = stages(Both().eval(), config, torch.randn(2, 4, 5))
    assert prepared.one.weight_fake_quant is not prepared.up.weight_fake_quant
    assert converted.one.weight is not converted.up.weight
