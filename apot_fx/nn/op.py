"""What prepared and converted operators have in common."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..tensor import keep_float32
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

    def release(self) -> None:
        """Let go of float weights that are packed now: the user may still hold this module, or the
        float layer, whose registry this is."""
        self._parameters.clear()
        self.__dict__.get("_flat_weights", []).clear()  # torch's recurrent layers' own list


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
    #: Of the float result, where the operator itself decides it.
    output_dtype: torch.dtype

    @abc.abstractmethod
    def compute(self, input: Any, *args: Any, **operands: Any) -> torch.Tensor:
        """The float result, by the contract's arithmetic; called as the float layer is."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self.standalone:
            return self.compute(*args, **kwargs)
        x, *readers = args
        return emit(self.compute(x, **kwargs), tuple(readers))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """Scales stay float32; the result's dtype follows the model's."""
        for child in self.children() if recurse else ():
            child._apply(fn)
        if "output_dtype" in self.__dict__:
            self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        return super()._apply(keep_float32(fn), recurse=False)


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
