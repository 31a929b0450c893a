"""transformers' Conv1D (by name: it is not imported), and attention's own Linear."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import apot_fx
from apot_fx import QConfig, QConfigMapping, WeightSpec
from tests.nn.test_transposed import CONFIGS, stages


class Conv1D(nn.Module):
    """What transformers has under this name: a Linear that stores (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size_out = x.size()[:-1] + (self.nf,)  # noqa: RUF005
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


Conv1D.__module__ = "transformers.pytorch_utils"


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("transformers", "transformers.pytorch_utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["transformers.pytorch_utils"], "Conv1D", Conv1D, raising=False)
    yield


class Mlp(nn.Module):
    def __init__(self, python: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.python = Conv1D(24, 12), Conv1D(5, 24), python

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.python and float(x.sum()) > 1e9:
            return x
        return self.down(torch.relu(self.up(x)))


@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_conv1d(python: bool, config: str) -> None:
    x = torch.randn(2, 3, 12)
    model = Mlp(python).eval()
    prepared, converted, _ = stages(model, CONFIGS[config], x)
    quant = prepared.up.weight_fake_quant
    assert prepared.up.weight.shape == (12, 24)
    assert config == "tensor" or quant.alpha.shape[0] == 24
    assert converted.up.weight.shape == (24, 12)
    rows = {row["name"]: row for row in apot_fx.explain(prepared).rows}
    assert rows["up"]["form"] == "quantized"
    assert rows["up"]["op"] == ("Conv1D" if python else "linear")
    # The same integers as a Linear with the transposed weight.
    linear = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5)).eval()
    for place, part in (("0", model.up), ("2", model.down)):
        twin = linear.get_submodule(place)
        twin.load_state_dict({"weight": part.weight.t(), "bias": part.bias})
    _, twin, _ = stages(linear, CONFIGS[config], x)
    assert torch.equal(twin(x), converted(x))


def test_a_weight_only_preset_reaches_conv1d_but_not_the_head() -> None:
    for python in (False, True):
        prepared = apot_fx.prepare_apot(Mlp(python), "w4")
        rows = {row["name"]: row["form"] for row in apot_fx.explain(prepared).rows}
        assert rows["up"] == "quantized" and rows["down"] == "float"


def test_batch_norm_counts_conv1ds_outputs() -> None:
    model = nn.Sequential(Conv1D(8, 4), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    model.train()(torch.randn(9, 4))
    prepared, _, _ = stages(model.eval(), CONFIGS["w4a4"], torch.randn(3, 4))
    assert apot_fx.explain(prepared, "0").rows[0]["form"] == "quantized"


class Own(Conv1D):
    pass


def test_a_subclass_of_conv1d_called_by_python_stays_float() -> None:
    model = Mlp(python=True)
    model.up = Own(24, 12)
    model.up.forward = model.up.forward  # type: ignore[method-assign]
    prepared = apot_fx.prepare_apot(model, QConfigMapping.from_preset("w4a4"))
    assert {row["name"] for row in apot_fx.explain(prepared).rows} >= {"up", "down"}


def test_attentions_linear_is_a_linear() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(NonDynamicallyQuantizableLinear(6, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    prepared, _, _ = stages(model, QConfigMapping.from_preset("w4a4"), torch.randn(3, 6))
    row: dict[str, Any] = apot_fx.explain(prepared, "0").rows[0]
    assert row["form"] == "quantized" and row["op"] == "Linear"
    only = QConfigMapping().set_object_type(nn.Linear, QConfig(WeightSpec(4)))
    assert apot_fx.explain(apot_fx.prepare_apot(model, only), "0").rows[0]["form"] == "quantized"


def test_bilinear_has_a_reason() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both, self.last = nn.Bilinear(3, 3, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.both(x, x))

    prepared, _, _ = stages(Pair().eval(), QConfigMapping.from_preset("w4a4"), torch.randn(2, 3))
    assert "no quantized form" in apot_fx.explain(prepared, "both").rows[0]["why"]
