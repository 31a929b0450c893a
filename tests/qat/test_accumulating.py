"""Weights that are quantized once for several batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import apot_fx
from apot_fx.kernels import dispatch
from tests.nets import calibrated, seeded

BATCHES = torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))


def prepared_net() -> nn.Module:
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)))
    return calibrated(model, list(BATCHES), apot_fx.QConfig.from_preset("w3a3")).train()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    for batch in BATCHES:
        model(batch).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.fixture
def weights_quantized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many times a weight was quantized so far, in its only element."""
    count, real = [0], dispatch.fake_quantize

    def counting(x: torch.Tensor, alpha: torch.Tensor, *how: Any) -> torch.Tensor:
        count[0] += alpha.dim() == 1
        return real(x, alpha, *how)

    monkeypatch.setattr(dispatch, "fake_quantize", counting)
    return count


def test_the_same_gradients_with_weights_quantized_once(weights_quantized: list[int]) -> None:
    model = prepared_net()
    weights_quantized[0] = 0
    expected = gradients(model)
    assert weights_quantized == [6]
    with apot_fx.qat.accumulating():
        found = gradients(model)
    assert weights_quantized == [8]
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    gradients(model)
    assert weights_quantized == [14]


@pytest.mark.parametrize("what", ["weight", "alpha"])
def test_a_step_inside_is_seen(what: str, weights_quantized: list[int]) -> None:
    model, other = prepared_net(), prepared_net()
    weights_quantized[0] = 0
    layers = [m.get_submodule("0") for m in (model, other)]
    with apot_fx.qat.accumulating():
        model(BATCHES[0])
        with torch.no_grad():
            for layer in layers:
                quant = layer.get_submodule("weight_fake_quant")
                (layer if what == "weight" else quant).get_parameter(what).mul_(0.5)
        assert torch.equal(model(BATCHES[0]), other(BATCHES[0]))
    assert weights_quantized == [2 + 1 + 2]  # `other` had none yet


def test_evaluation_and_inference_inside() -> None:
    model = prepared_net()
    with apot_fx.qat.accumulating():
        model(BATCHES[0])
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                inside = model.eval()(BATCHES[0])
                trained = model.train()(BATCHES[0])
            assert torch.equal(inside, model.eval()(BATCHES[0]))
            assert torch.equal(trained, model.train()(BATCHES[0]))


def test_layers_of_a_stage_of_its_own() -> None:
    """Two models at once do not mix, and contexts nest."""
    one, other = prepared_net(), prepared_net()
    with torch.no_grad():
        other.get_submodule("0").get_parameter("weight").mul_(2)
    expected = one(BATCHES[0]), other(BATCHES[0])
    with apot_fx.qat.accumulating(), apot_fx.qat.accumulating():
        for _ in range(2):
            assert torch.equal(one(BATCHES[0]), expected[0])
            assert torch.equal(other(BATCHES[0]), expected[1])


def test_computed_weights_are_never_kept() -> None:
    """Their memory may come again with other values."""
    model = seeded(lambda: nn.Sequential(weight_norm(nn.Linear(6, 9)), nn.ReLU(), nn.Linear(9, 4)))
    config = apot_fx.QConfig.from_preset("w3a3")
    one, other = (calibrated(model, list(BATCHES), config).train() for _ in range(2))
    with apot_fx.qat.accumulating(), torch.no_grad():
        for _ in range(5):
            for net in (one, other):
                for parameter in net.get_submodule("0.parametrizations").parameters():
                    parameter.mul_(0.9)
            assert torch.equal(one(BATCHES[0]), copy.deepcopy(other)(BATCHES[0]))


def test_another_alpha_view_or_writer() -> None:
    weight = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    quant = apot_fx.FakeQuantize.for_weight(weight, apot_fx.WeightSpec(4), "weight").train()
    expected, turned = quant(weight).detach(), quant(weight.t()).detach()
    with apot_fx.qat.accumulating(), torch.no_grad():
        quant(weight).zero_()
        assert torch.equal(quant(weight), expected)
        assert torch.equal(quant(weight.t()), turned)
        quant.alpha = nn.Parameter(quant.alpha * 3)
        assert not torch.equal(quant(weight.t()), turned)


def test_other_parameters_by_a_functional_call() -> None:
    model = prepared_net()
    with apot_fx.qat.accumulating(), torch.no_grad():
        for scale in (1.0, 2.0, 3.0):
            own = {k: (v * scale).clone() for k, v in model.named_parameters()}
            found = torch.func.functional_call(model, own, (BATCHES[0],))
            with torch.no_grad():
                other = copy.deepcopy(model)
                for name, parameter in other.named_parameters():
                    parameter.copy_(own[name])
            assert torch.equal(found, other(BATCHES[0]))
