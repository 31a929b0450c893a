"""The life of a fake-quant, its switches and what its state_dict carries."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import apot_fx
from apot_fx import ActivationSpec, FakeQuantize, WeightSpec
from apot_fx.errors import CalibrationError, StateError


def activation(**options: object) -> FakeQuantize:
    return FakeQuantize.for_activation(ActivationSpec(**options)).eval()


def test_observing_passes_floats_and_observes() -> None:
    quant, x = activation(), torch.randn(100)
    assert quant(x) is x and quant.state == "observing" and quant.seen
    assert quant.signed is None and quant.level_set is None


def test_freeze_fixes_sign_and_alpha() -> None:
    quant = activation(observer="minmax")
    quant(torch.tensor([0.0, 3.0]))
    quant.freeze()
    assert quant.state == "frozen" and quant.signed is False and quant.alpha == 3.0
    assert quant.level_set == apot_fx.LevelSet.apot(4, signed=False)
    before = quant.alpha.clone()
    quant(torch.tensor([100.0]))
    assert quant.alpha == before


def test_what_the_graph_or_the_config_says_wins() -> None:
    proved = FakeQuantize.for_activation(ActivationSpec(), signed=False).eval()
    proved(torch.tensor([-1.0, 1.0]))
    proved.freeze()
    assert proved.signed is False
    chosen = activation(signed=True)
    chosen(torch.tensor([1.0]))
    chosen.freeze()
    assert chosen.signed is True


def test_nothing_observed_cannot_be_frozen() -> None:
    quant = activation()
    quant(torch.tensor([float("nan")]))
    quant(torch.empty(0))
    with pytest.raises(CalibrationError, match="observed nothing"):
        quant.freeze()


def test_train_makes_frozen_learning() -> None:
    quant = activation()
    quant(torch.randn(100))
    quant.freeze()
    quant.train()
    assert quant.state == "learning"
    quant(torch.randn(10)).sum().backward()
    assert quant.alpha.grad is not None
    quant.eval()
    assert quant.state == "learning"


def test_a_frozen_alpha_takes_no_gradient() -> None:
    quant = activation()
    quant(torch.randn(100))
    quant.freeze()
    x = torch.randn(10, requires_grad=True)
    quant(x).sum().backward()
    assert quant.alpha.grad is None and x.grad is not None


def test_first_train_forward_initialises() -> None:
    quant = activation().train()
    y = quant(torch.rand(100))
    assert quant.state == "learning" and quant.signed is True  # one batch says little about signs
    assert len(y.unique()) <= 15


def test_an_enabled_observer_leads_alpha() -> None:
    quant = activation(observer="minmax")
    quant(torch.tensor([-1.0, 1.0]))
    quant.freeze()
    quant.train().apply(apot_fx.enable_observer)
    x = torch.tensor([-4.0, 4.0], requires_grad=True)
    quant(x).sum().backward()
    assert quant.alpha == 4.0 and quant.alpha.grad is None
    quant.apply(apot_fx.disable_observer)
    quant(x).sum().backward()
    assert quant.alpha.grad is not None


def test_an_enabled_weight_observer_follows_the_weight() -> None:
    quant = FakeQuantize.for_weight(torch.ones(2, 3), WeightSpec(observer="minmax"), "w")
    quant.apply(apot_fx.enable_observer)
    quant(torch.full((2, 3), 5.0))
    assert quant.alpha.tolist() == [5.0, 5.0]


def test_state_dict_is_tensors_only_and_round_trips() -> None:
    quant = activation(observer="mse")
    quant(torch.randn(100))
    quant.freeze()
    state = quant.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = activation(observer="mse")
    other.load_state_dict(state)
    x = torch.randn(50)
    assert torch.equal(other(x), quant(x)) and other.state == "frozen"
    assert other.level_set == quant.level_set and other.unit == quant.unit


def test_bad_state_is_refused() -> None:
    quant = activation()
    state = copy.deepcopy(quant.state_dict())
    state["_extra_state"] = torch.tensor([1, 2, 3], dtype=torch.uint8)
    with pytest.raises(StateError, match="_extra_state"):
        quant.load_state_dict(state)


def test_half_models_keep_float32_scales() -> None:
    quant = activation()
    quant(torch.randn(100))
    quant.freeze()
    alpha = quant.alpha.clone()
    wrapped = nn.Sequential(quant).half()
    assert quant.alpha.dtype == torch.float32 and torch.equal(quant.alpha, alpha)
    y = wrapped(torch.randn(4).half())
    assert y.dtype == torch.float32  # in eval the grid stays exact
    assert wrapped.train()(torch.randn(4).half()).dtype == torch.float16


@pytest.mark.parametrize("observer", ["minmax", "moving_average", "mse", "percentile"])
def test_led_twice_before_gradients(observer: str) -> None:
    spec = ActivationSpec(4, observer=observer)
    quant = FakeQuantize.for_activation(spec, signed=True).train()
    x = torch.randn(50, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quant(x)
    quant.observer_enabled = True
    first, second = quant(x.detach() * 0.5), quant(x)
    inside = quant.alpha.detach().clone()
    (quant(x) + quant(4 * x)).sum().backward()
    assert x.grad is not None and quant.alpha.grad is None
    assert first.shape == second.shape and bool(quant.alpha >= inside)


@pytest.mark.parametrize("observer", ["minmax", "moving_average"])
def test_led_in_one_compiled_graph(observer: str) -> None:
    made = []
    for compiles in (False, True):
        quant = FakeQuantize.for_activation(ActivationSpec(4, observer=observer), signed=True)
        quant.train()(torch.linspace(-1, 1, 9))
        quant.observer_enabled = True
        call = torch.compile(quant, fullgraph=True, backend="aot_eager") if compiles else quant
        made.append((call(torch.linspace(-2, 3, 9)), quant.alpha.detach()))
    assert all(map(torch.equal, *made))


def test_a_leading_observer_is_seen_by_earlier_gradients() -> None:
    quant = FakeQuantize.for_activation(ActivationSpec(4, observer="minmax"), signed=True).train()
    x = torch.randn(50).requires_grad_()
    quant(x)
    y = quant(x)
    quant.observer_enabled = True
    quant(3 * x.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
