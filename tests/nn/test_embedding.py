"""Embeddings by row: fl(q · step) of looked-up rows, torch's own bags and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import apot_fx
from apot_fx import ActivationSpec, LevelSet, QConfig, QConfigMapping, WeightSpec
from apot_fx.nn import EMBEDDINGS, ConvertedEmbedding
from apot_fx.nn.standalone import convert_standalone, prepare_standalone
from apot_fx.tensor import ApotTensor
from tests.nn.test_transposed import stages
from tests.numpy_oracle import nearest, step_of

ROWS, WIDTH = 20, 12
SPECS = {
    "row": WeightSpec(4),
    "group": WeightSpec(3, granularity="group", group_size=5),
    "tensor": WeightSpec(5, granularity="tensor"),
    "wide": WeightSpec(9, kind="uniform"),
}


class Words(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.emb = nn.Embedding(ROWS, WIDTH, **options)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.fc(functional.gelu(self.emb(words)))


class Bags(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.emb = nn.EmbeddingBag(ROWS, WIDTH, **options)
        self.fc = nn.Linear(WIDTH, 3)

    def forward(self, words: Any, offsets: Any = None, weights: Any = None) -> torch.Tensor:
        return self.fc(self.emb(words, offsets, per_sample_weights=weights))


def on_request(spec: WeightSpec, base: str = "w4a4") -> QConfigMapping:
    """A preset with both embeddings named; what it says of activations means nothing to them."""
    config = QConfig(spec, ActivationSpec(4))
    mapping = QConfigMapping.from_preset(base).set_object_type(nn.Embedding, config)
    return mapping.set_object_type(nn.EmbeddingBag, config)


def words(*shape: int) -> torch.Tensor:
    return torch.randint(0, ROWS, shape)


@pytest.mark.parametrize("spec", SPECS)
def test_lookups_are_the_grids_values(spec: str) -> None:
    """Against the quantizer's oracle, row by row."""
    torch.manual_seed(0)
    model, x = Words(), words(3, 7)
    prepared, converted, _ = stages(model.eval(), on_request(SPECS[spec]), x)
    quant = prepared.emb.weight_fake_quant
    levels, size = tuple(quant.known_level_set().levels), SPECS[spec].group_size or WIDTH
    alpha = quant.alpha.detach().numpy()
    own = alpha
    if alpha.ndim:
        own = alpha[:, None] if alpha.ndim == 1 else alpha[:, np.arange(WIDTH) // size]
    table = nearest(model.emb.weight.detach().numpy(), own, levels) * step_of(own, levels)
    for stage in (prepared, converted):
        found = stage.emb(x).detach().numpy()
        assert np.array_equal(found, table[x.numpy()].astype(np.float32))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True},
                                     {"sparse": True}])  # fmt: skip
@pytest.mark.parametrize("spec", ["row", "group", "tensor"])
def test_gradients_are_torchs(options: dict[str, Any], spec: str) -> None:
    """Inside of the range the table's gradient is that of torch's embedding, in both modes."""
    torch.manual_seed(0)
    layer = nn.Embedding(ROWS, WIDTH, **options)
    config = QConfig(WeightSpec(**{**SPECS[spec].__dict__, "observer": "minmax"}))
    x = words(4, 5)
    layer(x).square().sum().backward()
    plain = layer.weight.grad.to_dense()
    layer.zero_grad()
    prepared = prepare_standalone(layer, config, "emb")
    for mode in (False, True):
        prepared.train(mode)
        y = prepared(x)
        surrogate = (prepared(x) * layer(x).detach() * 2).sum()
        layer.zero_grad()
        surrogate.backward()
        assert torch.allclose(layer.weight.grad.to_dense(), plain, rtol=1e-5)
        assert y.shape == (4, 5, WIDTH)
    assert prepared.weight_fake_quant.alpha.grad is not None  # alpha learns in train


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"include_last_offset": True}])
def test_bags(mode: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, mapping = Bags(mode=mode, **options).eval(), on_request(SPECS["row"])
    stages(model, mapping, words(3, 7), example_inputs=(words(3, 7),))
    calls: list[tuple[Any, ...]] = [(words(9), torch.tensor([0, 2, 2, 9]))]
    calls.append((torch.full((4,), 2), torch.tensor([0, 3])))
    if mode == "sum":
        calls.append((words(9), torch.tensor([0, 4, 9]), torch.rand(9)))
    for call in calls:
        prepared, converted, _ = stages(model, mapping, *call, example_inputs=call)
        table = converted.emb.weight.dequantize()
        offsets, weights = (*call[1:], None)[:2]
        wanted = functional.embedding_bag(
            call[0], table, offsets, mode=mode, per_sample_weights=weights, **options
        )
        assert torch.equal(converted.emb(call[0], offsets, weights), wanted)
        prepared.train()(*call).sum().backward()
        assert prepared.emb.weight.grad is not None


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(2, 11), st.sampled_from([None, 4]))
def test_rows_are_unpacked_alone(rows: int, width: int, bits: int, size: int | None) -> None:
    """Also where rows share bytes."""
    weight, levels = torch.randn(rows, width), LevelSet.uniform(bits, True)
    groups = () if size is None else (-(-width // size),)
    alpha = torch.rand(rows, *groups) + 0.5
    tensor = ApotTensor.from_float(weight, alpha, levels, axis=0, group_size=size)
    chosen = torch.randint(0, rows, (5,))
    assert torch.equal(tensor.dequantize_rows(chosen), tensor.dequantize()[chosen])
    assert tensor.dequantize_rows(chosen[:0]).shape == (0, width)


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_edges(kind: type[nn.Module]) -> None:
    layer = kind(ROWS, WIDTH)
    prepared = prepare_standalone(layer, QConfig(SPECS["row"]), "emb").eval()
    converted = convert_standalone(prepared, low_memory=False)
    assert isinstance(converted, ConvertedEmbedding) and set(converted.state_dict()) == {
        "weight.packed",
        "weight.alpha",
    }
    for x in (words(0, 3), words(2, 3).int(), words(2, 3)[:, ::2]):
        assert torch.equal(prepared(x), converted(x)) and prepared(x).shape == layer(x).shape
    for wrong in (-1, ROWS):
        for stage in (prepared, converted):
            with pytest.raises(IndexError):
                stage(torch.full((1, 2), wrong))
    prepared.bfloat16()
    x = words(2, 3)
    assert prepared(x).dtype == torch.bfloat16
    assert torch.equal(prepared(x), convert_standalone(prepared, low_memory=True)(x))


def test_float64_tables() -> None:
    layer, x = nn.Embedding(ROWS, WIDTH).double(), words(2, 3)
    prepared = prepare_standalone(layer, QConfig(SPECS["row"]), "emb").eval()
    assert prepared(x).dtype == torch.float64
    assert torch.equal(prepared(x), convert_standalone(prepared, low_memory=False)(x))


@pytest.mark.parametrize("preset", ["w4a4", "w4"])
def test_only_on_request(preset: str) -> None:
    for config in (preset, QConfig(WeightSpec(4))):
        row = apot_fx.explain(apot_fx.prepare_apot(Words(), config), "emb").rows[0]
        assert row["form"] == "float" and "embeddings" in row["why"] and "request" in row["why"]
    mapping = QConfigMapping.from_preset(preset).set_module_name("emb", "w3")
    row = apot_fx.explain(apot_fx.prepare_apot(Words(), mapping), "emb").rows[0]
    assert row["form"] == "quantized" and "apot3" in row["weight"] and row["input"] == "row numbers"


def test_the_layer_behind_an_embedding_is_a_first_one() -> None:
    for config in ("w4a4", on_request(SPECS["row"])):
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        rows = {r["name"]: r for r in apot_fx.explain(apot_fx.prepare_apot(model, config)).rows}
        assert "uniform8" in rows["1"]["weight"] and "apot4" in rows["2"]["weight"]


def test_max_norm_stays_float() -> None:
    mapping = on_request(SPECS["row"])
    for model in (Words(max_norm=1.0), Bags(max_norm=1.0)):
        prepared = apot_fx.prepare_apot(model, mapping, example_inputs=(words(2, 3),))
        assert "max_norm" in apot_fx.explain(prepared, "emb").rows[0]["why"]
        converted = apot_fx.convert_apot(calibrated(prepared, words(2, 3)))
        assert type(converted.emb) is type(model.emb)


def calibrated(prepared: nn.Module, x: torch.Tensor) -> nn.Module:
    apot_fx.calibrate(prepared, [x], progress=False)
    return prepared


class Python(Words):
    """Called by Python code, by name."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        if float(words.sum()) < 0:
            return words
        return self.fc(self.emb(input=words))


def test_called_by_python_code() -> None:
    prepared, converted, _ = stages(Python().eval(), on_request(SPECS["row"]), words(2, 3))
    assert isinstance(converted.emb, ConvertedEmbedding)
    assert apot_fx.explain(prepared, "emb").rows[0]["why"] == "called by Python code"


def test_an_observer_sees_the_table() -> None:
    layer = nn.Embedding(ROWS, WIDTH)
    prepared = prepare_standalone(layer, QConfig(WeightSpec(4, observer="minmax")), "emb").train()
    prepared.apply(apot_fx.enable_observer)
    with torch.no_grad():
        layer.weight.mul_(3)
    prepared(words(2))
    assert torch.allclose(prepared.weight_fake_quant.alpha, layer.weight.abs().amax(1))
