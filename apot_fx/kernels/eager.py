"""Fake-quant as modules call it: straight to the kernel where nobody is watching.

An operator call costs more than the kernel itself on small tensors. So eager code goes around the
dispatcher; whoever traces, compiles, transforms or watches calls sees the operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from . import dispatch

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def fake_quantize(
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None = None,
    group_size: int | None = None,
    grad: str = "ste",
    nan_to_zero: bool = False,
) -> torch.Tensor:
    """``torch.ops.apot_fx.fake_quantize`` by the shortest way; unchecked, as the operator is."""
    if type(x) not in _PLAIN or type(alpha) not in _PLAIN or _watched(x):
        made: torch.Tensor = torch.ops.apot_fx.fake_quantize(
            x, alpha, spec, axis, group_size, grad, nan_to_zero
        )
        return made
    arguments = (x, alpha, spec, axis, group_size, grad, nan_to_zero)
    if torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad):
        made = _FakeQuantize.apply(*arguments)
        return made
    return dispatch.fake_quantize(*arguments)


def follow(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    constant: float,
) -> bool:
    """:func:`dispatch.follow`, where nobody is watching; False: not done."""
    if type(x) not in _PLAIN or _watched(x):
        return False
    return dispatch.follow(x, low, high, alpha, spec, constant)


def _watched(x: torch.Tensor) -> bool:
    """Whether something other than plain eager autograd is to see the call.

    The first question comes first: a compiler follows none of the others.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or x.is_neg()
    )


class _FakeQuantize(torch.autograd.Function):
    """Saves x and α, nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        alpha: torch.Tensor,
        spec: str,
        axis: int | None,
        group_size: int | None,
        grad: str,
        nan_to_zero: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.how = spec, axis, group_size, grad
        return dispatch.fake_quantize(x, alpha, spec, axis, group_size, grad, nan_to_zero)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, alpha = ctx.saved_tensors
        dx, dalpha = dispatch.fake_quantize_backward(grad.to(x.dtype), x, alpha, *ctx.how)
        return dx, dalpha if ctx.how[3] == "rcf" else None, None, None, None, None, None
