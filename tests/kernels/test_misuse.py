"""Calls that do not fit are refused, and nothing is read that is not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import apot_fx
from apot_fx import LevelSet
from apot_fx.errors import TensorError
from apot_fx.kernels import packing

OPS = torch.ops.apot_fx
SPEC = LevelSet.uniform(4, True).spec
X, ONE = torch.randn(4, 5), torch.ones(())

WRONG: dict[str, Callable[[], object]] = {
    "no alpha": lambda: OPS.fake_quantize(X, torch.ones(0), SPEC),
    "many alphas": lambda: OPS.fake_quantize(X, torch.ones(7), SPEC),
    "too few alphas": lambda: OPS.quantize(X, torch.ones(3), SPEC, 0),
    "too few groups": lambda: OPS.quantize(X, torch.ones(4, 2), SPEC, 0, 2),
    "no such axis": lambda: OPS.quantize(X, torch.ones(4), SPEC, 7),
    "negative groups": lambda: OPS.quantize(X, torch.ones(4, 1), SPEC, 0, -1),
    "groups of no axis": lambda: OPS.quantize(X, torch.ones(4, 1), SPEC, None, 2),
    "packed": lambda: OPS.quantize_packed(X, torch.ones(3), SPEC, 0),
    "short gradient": lambda: OPS.fake_quantize_backward(
        torch.randn(3), torch.randn(10_000), ONE, SPEC, None, None, "rcf"
    ),
    "too few bytes": lambda: OPS.unpack(torch.zeros(2, dtype=torch.uint8), 4, [50_000]),
    "index beyond": lambda: OPS.dequantize(torch.tensor([15], dtype=torch.uint8), ONE, SPEC),
}


@pytest.mark.parametrize("call", WRONG)
def test_what_does_not_fit_is_refused(call: str) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        WRONG[call]()


def test_what_broadcasts_is_computed() -> None:
    one = OPS.fake_quantize(X, torch.ones(1), SPEC, 0)
    assert torch.equal(one, OPS.fake_quantize(X, torch.ones(4), SPEC, 0))
    wide = torch.arange(8)
    assert torch.equal(OPS.unpack(wide, 4, [16]), packing.unpack(wide, 4, [16]))


def test_no_second_gradient_is_lost_in_silence() -> None:
    x = torch.randn(9, requires_grad=True)
    alpha = torch.tensor(1.0, requires_grad=True)
    y = apot_fx.fake_quantize(x, alpha, LevelSet.apot(4), grad="rcf")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(TensorError, match="second gradient"):
        grad.sum().backward()
