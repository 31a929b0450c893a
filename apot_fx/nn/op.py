"""What prepared and converted operators have in common."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import nn

from .quantize import emit


class PreparedOp(nn.Module):
    """An operator on quantized inputs; called as ``op(x, fake_quant, batch_norm)``.

    ``x`` is a value on ``fake_quant``'s grid, or a tuple of values; ``fake_quant`` then is a tuple
    too, one for each. Operands that stay float come by keyword. Modules are passed, not stored,
    since one operator may be called at several nodes. A ``standalone`` one instead owns the
    fake-quants of its inputs and is called as the float layer is.
    """

    standalone: bool = False

    @property
    def kind(self) -> str:
        """What it computes, for people."""
        return type(self).__name__


class ConvertedOp(nn.Module):
    """The same on indices; called as ``op(x, *readers)``, readers as :func:`emit` takes them.

    Operands that stay float come by keyword.

    It re-quantizes its result itself for every quantized reader: the pass over a result decides a
    network's speed, so it belongs to the operator, and no float tensor shows in the graph.
    """

    standalone: bool = False
    kind: str  # what it computes, for people
    #: Level set of the input's indices, "" where the input is float; of a tuple's, one for each.
    input_spec: str | tuple[str, ...]

    @abc.abstractmethod
    def compute(self, input: Any, *args: Any, **operands: Any) -> torch.Tensor:
        """The float result, by the contract's arithmetic; called as the float layer is."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self.standalone:
            return self.compute(*args, **kwargs)
        x, *readers = args
        return emit(self.compute(x, **kwargs), tuple(readers))


def with_gradient_of(value: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
    """``value`` with ``surrogate``'s gradient: eval stays exact and can be trained through."""
    result: torch.Tensor = _GradientOf.apply(value, surrogate)
    return result


class _GradientOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, surrogate: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grad[0]
