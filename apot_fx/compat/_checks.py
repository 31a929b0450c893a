"""What compat's functions ask of their arguments, each in one place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import TensorError

QPARAMS = ("alpha", "gamma", "quantization_levels", "level_indices")


def checked(value: Any, what: str, kind: str = "real") -> Tensor:
    """``value`` without its gradient; raises TensorError unless it is a tensor of that kind.

    ``what``: whose it is and its name, for the message. ``kind``: "floating-point", "integer" or
    "real", which is either; bool is none of them.
    """
    if isinstance(value, Tensor):
        floats = value.is_floating_point()
        integers = not (floats or value.is_complex() or value.dtype == torch.bool)
        if {"floating-point": floats, "integer": integers, "real": floats or integers}[kind]:
            return value.detach()
    found = value.dtype if isinstance(value, Tensor) else f"of type {type(value).__name__}"
    article = "an" if kind == "integer" else "a"
    raise TensorError(f"{what} is {found}; {article} {kind} tensor is wanted")


def one_value(value: Tensor, what: str) -> Tensor:
    """A tensor of one element, of any number of dimensions; raises TensorError for another."""
    if value.numel() != 1:
        raise TensorError(f"{what} has shape {tuple(value.shape)}; one value is wanted")
    return value


def qparam(value: Any, name: str) -> Tensor:
    """One of the four, a tensor or what makes one; without its gradient. Raises TensorError."""
    try:
        return torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TensorError(
            f"{name} is of type {type(value).__name__}; pass {', '.join(QPARAMS)} as "
            "calculate_qparams gave them"
        ) from None
