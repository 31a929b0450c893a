"""``fake_quantize_function``: quantize and dequantize with a straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import working_dtype
from ._checks import checked, one_value, qparam
from .quantizer import quant_dequant_APoT


class fake_quantize_function(torch.autograd.Function):
    """``.apply(x, alpha, gamma, quantization_levels, level_indices)``; x is left as it is.

    The value is ``dequantize_APoT(quantize_APoT(x, …))`` in x's dtype. The gradient for x is 1
    where \\|x\\| ≤ α, ends included and whatever the levels' signs, else 0; the others get none.
    :func:`apot_fx.fake_quantize` also learns α.

    >>> from apot_fx.compat import APoTObserver
    >>> observer = APoTObserver(b=4, k=2)
    >>> observer.min_val, observer.max_val = torch.tensor(0.0), torch.tensor(1.0)
    >>> qparams = observer.calculate_qparams(signed=False)
    >>> x = torch.tensor([-2.0, -1.0, 0.4, 1.0, 3.0], requires_grad=True)
    >>> y = fake_quantize_function.apply(x, *qparams)
    >>> y.tolist()
    [0.0, 0.0, 0.375, 1.0, 1.0]
    >>> y.sum().backward()
    >>> x.grad.tolist()
    [0.0, 1.0, 1.0, 1.0, 0.0]
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        alpha: Tensor,
        gamma: Tensor,
        quantization_levels: Tensor,
        level_indices: Tensor,
    ) -> Tensor:
        values = checked(x, "fake_quantize_function: x", "floating-point")
        clip = one_value(qparam(alpha, "alpha"), "alpha").reshape(()).to(x.device)
        # widened first: a 0-dim α would be rounded to a bfloat16 x's dtype
        ctx.save_for_backward(values.to(working_dtype(x)).abs() <= clip)
        return quant_dequant_APoT(x, alpha, gamma, quantization_levels, level_indices)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        (mask,) = ctx.saved_tensors
        return torch.where(mask, grad_output, 0.0), None, None, None, None
