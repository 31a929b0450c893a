"""Fake-quant as modules call it: straight to the kernel where nobody is watching.

An operator call costs more than the kernel itself on small tensors. So eager code goes around the
dispatcher; whoever traces, compiles, transforms or watches calls sees the operator.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import dispatch
from .reference import ALPHA_MAX, ALPHA_MIN

_PLAIN = (torch.Tensor, torch.nn.Parameter)


def fake_quantize(
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None = None,
    group_size: int | None = None,
    grad: str = "ste",
    nan_to_zero: bool = False,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """``torch.ops.apot_fx.fake_quantize`` by the shortest way; unchecked, as the operator is.

    ``known``: its result, where that is known; nothing is computed then but gradients.
    """
    if type(x) not in _PLAIN or type(alpha) not in _PLAIN or _watched(x):
        made: torch.Tensor = torch.ops.apot_fx.fake_quantize(
            x, alpha, spec, axis, group_size, grad, nan_to_zero
        )
        return made
    arguments = (x, alpha, spec, axis, group_size, grad, nan_to_zero)
    if torch.is_grad_enabled() and (x.requires_grad or alpha.requires_grad):
        made = _FakeQuantize.apply(*arguments, known)
        return made
    return dispatch.fake_quantize(*arguments) if known is None else known.detach()


def follow(
    x: torch.Tensor, alpha: torch.Tensor, spec: str, led: dispatch.Led, nan_to_zero: bool
) -> torch.Tensor | None:
    """:func:`dispatch.follow`, where nobody is watching; None: nothing done."""
    if type(x) not in _PLAIN or _watched(x):
        return None
    return dispatch.follow(x, alpha, spec, led, nan_to_zero)


class QuantizedData(NamedTuple):
    """What a quantized value was made of, where that takes no gradient but its one α does."""

    x: torch.Tensor
    alpha: torch.Tensor
    spec: str


def quantized_data(quantized: torch.Tensor) -> QuantizedData | None:
    """Where ``quantized`` comes right from the fake-quant of float32 data, and no hook waits for
    its gradient."""
    if torch.compiler.is_compiling():
        return None
    made = quantized.grad_fn
    data = getattr(made, "data", None) if isinstance(made, _NODE) else None
    hooked = quantized._backward_hooks or quantized.retains_grad
    return data if quantized.dtype is torch.float32 and not hooked else None


def change_by_alpha(
    quantized: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, spec: str
) -> torch.Tensor:
    """``dx_q/dα`` of every value (contract 4.4), as ``(x_q − x·inside)/α``; 0 for NaN."""
    inside, _ = dispatch.fake_quantize_backward(x, x, alpha, spec, None, None, "ste")
    change = (quantized - inside).div_(alpha.clamp(ALPHA_MIN, ALPHA_MAX))
    return change.nan_to_num_(nan=0.0)


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
        known: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, alpha)
        ctx.how = spec, axis, group_size, grad
        if not ctx.needs_input_grad[0] and grad == "rcf" and axis is None:
            ctx.data = QuantizedData(x, alpha, spec)
        if known is not None:
            return known.detach()
        return dispatch.fake_quantize(x, alpha, spec, axis, group_size, grad, nan_to_zero)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        x, alpha = ctx.saved_tensors
        dx, dalpha = dispatch.fake_quantize_backward(grad.to(x.dtype), x, alpha, *ctx.how)
        return dx, dalpha if ctx.how[3] == "rcf" else None, *[None] * 6


_NODE: type = _FakeQuantize._backward_cls  # type: ignore[attr-defined]
