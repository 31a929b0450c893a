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

from ..kernels.eager import QuantizedData, quantized_data

#: A layer's call without, and with its bias.
Linear = Callable[[torch.Tensor], torch.Tensor]


def on_data(x: torch.Tensor, linear: Linear, biased: Linear) -> torch.Tensor:
    """``biased(x)``; where ``x`` is quantized data, with α's gradient by the short way."""
    data = quantized_data(x)
    if data is None:
        return biased(x)
    fixed = x.detach()
    y: torch.Tensor = _AlphaOfData.apply(biased(fixed), data.alpha, fixed, data, linear)
    return y


class _AlphaOfData(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        alpha: torch.Tensor,
        x: torch.Tensor,
        data: QuantizedData,
        linear: Linear,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.data, ctx.linear = data, linear
        return y.view_as(y)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        change = ctx.linear(ctx.data.change_by_alpha(x))
        total = change.mul_(grad).sum(dtype=torch.float64)
        return grad, ctx.data.gradient(total), None, None, None
