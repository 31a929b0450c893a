"""The scalar rules. A tensor of any shape does as well as a number, and far faster than a loop."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

from . import _tables
from ._checks import checked, qparam


def float_to_apot(
    x: float | Tensor, levels: Tensor, indices: Tensor, alpha: float | Tensor
) -> Tensor:
    """The code of the level nearest to x, ties to the lower; beyond the ends the end level's.

    Args:
        x: a number or a float tensor.
        levels: float, (N,), 0 among them.
        indices: the code of each level, integers, (N,).
        alpha: clip value: what the largest level stands for.

    Returns codes of x's shape (0-dim for a number) and indices' dtype. Raises CompatError where
    ``levels`` make no level set.

    >>> levels, codes = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([0, 3, 2, 1])
    >>> int(float_to_apot(0.3, levels, codes, 1.0)), int(float_to_apot(7.0, levels, codes, 1.0))
    (3, 1)
    """
    levels, indices = qparam(levels, "levels"), qparam(indices, "indices")
    values, clip = _as_values(x, levels), qparam(alpha, "alpha")
    return _tables.quantize(values, clip, levels, indices).to(indices.dtype)


def apot_to_float(x_apot: int | Tensor, levels: Tensor, indices: Tensor) -> Tensor:
    """The level of a code, or of each of a tensor's.

    Args as for :func:`float_to_apot`. Returns float32 (float64 where ``levels`` are) of x_apot's
    shape. Raises TensorError for a code that is not in ``indices``.

    >>> levels, codes = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([0, 3, 2, 1])
    >>> apot_to_float(3, levels, codes).item()
    0.25
    """
    levels, indices = qparam(levels, "levels"), qparam(indices, "indices")
    return _tables.dequantize(torch.as_tensor(x_apot), None, levels, indices)


def quant_dequant_util(x: float | Tensor, levels: Tensor, indices: Tensor) -> Tensor:
    """The level nearest to x, or to each of a tensor's values; ties to the lower.

    Args as for :func:`float_to_apot`. Returns x's shape and dtype (levels' for a number).

    >>> levels, codes = torch.tensor([0.0, 0.25, 0.5, 1.0]), torch.tensor([0, 3, 2, 1])
    >>> quant_dequant_util(0.3, levels, codes).item()
    0.25
    """
    levels, indices = qparam(levels, "levels"), qparam(indices, "indices")
    return _tables.quant_dequant(_as_values(x, levels), None, levels, indices)


def _as_values(x: float | Tensor, levels: Tensor) -> Tensor:
    if isinstance(x, Real):
        return torch.tensor(float(x), dtype=levels.dtype, device=levels.device)
    return checked(x, "x", "floating-point")
