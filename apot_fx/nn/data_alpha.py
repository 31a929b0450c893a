"""The gradient for α of the data, without one for the data.

What a first layer reads takes no gradient, but its α does. By the chain rule that is
``Σ dL/dx_q · dx_q/dα``, for whose first factor a convolution runs backward to its input: for few
channels the dearest call of a step, which float training does not make. As ``y`` is linear in
``x_q``, ``Σ dL/dy · layer(dx_q/dα)`` is the same sum, by one more call forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..kernels.eager import change_by_alpha, quantized_data
from ..kernels.reference import led_back

#: A layer of an input, a weight and a bias.
Layer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


def on_data(
    layer: Layer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """``layer(x, weight, bias)``; where ``x`` is quantized data, with α's gradient by the short
    way."""
    data = quantized_data(x)
    if data is None:
        return layer(x, weight, bias)
    fixed = x.detach()
    y = layer(fixed, weight, bias)
    made: torch.Tensor = _AlphaOfData.apply(
        y, data.alpha, fixed, data.x, weight.detach(), data.spec, layer
    )
    return made


class _AlphaOfData(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        alpha: torch.Tensor,
        quantized: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        spec: str,
        layer: Layer,
    ) -> torch.Tensor:
        ctx.save_for_backward(alpha, quantized, x, weight)
        ctx.spec, ctx.layer = spec, layer
        return y.view_as(y)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        alpha, quantized, x, weight = ctx.saved_tensors
        change = ctx.layer(change_by_alpha(quantized, x, alpha, ctx.spec), weight, None)
        total = change.mul_(grad).sum(dtype=torch.float64)
        return grad, led_back(total.to(alpha.dtype), alpha), *[None] * 5
