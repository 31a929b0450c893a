"""The multiply-accumulate kinds that layers are made of; linear is here, ``convolution`` beside it.

A kind is a frozen value shared by the prepared and the converted form of a layer, so that both
call the same operator with the same geometry.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import torch
import torch.nn.functional as functional

from ..levels import LevelSet

#: Sums of integers up to here are exact in float32.
EXACT_SUM = 2**24


def largest_sum(levels: torch.Tensor, inputs: LevelSet) -> float:
    """The largest partial sum that any input can give, from the weights themselves."""
    rows = levels.flatten(1).double()
    positive, negative = rows.clamp(min=0).sum(1), rows.clamp(max=0).neg().sum(1)
    worst = positive + negative if inputs.signed else torch.maximum(positive, negative)
    return inputs.unit * float(worst.max()) if worst.numel() else 0.0


class Product(abc.ABC):
    """What a layer computes of ``x``, weight, scale and bias.

    Arithmetic takes weights as rows: one per output channel on axis 0, ``(out, in/groups, …)``.
    """

    channel_axis: int
    name: str

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as the user's layer stores it, as rows."""
        return weight

    def stored(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows as the user's layer stores them."""
        return rows

    @abc.abstractmethod
    def in_float(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """What torch computes, of a weight as the user's layer stores it."""

    @abc.abstractmethod
    def channels_meet_batch_norm(self, x: torch.Tensor) -> bool:
        """Whether the output's channels lie on axis 1, as batch norm wants them."""

    @abc.abstractmethod
    def __call__(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        s: torch.Tensor,
        b: torch.Tensor,
        group_size: int | None,
        wide: bool,
    ) -> torch.Tensor:
        """Levels in (integer-valued float32), ``fl(fl(acc) · s) + b`` out."""

    @abc.abstractmethod
    def weight_only(
        self, x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, group_size: int
    ) -> torch.Tensor:
        """Float activations times levels, in the documented summation order (contract 4.8)."""


@dataclasses.dataclass(frozen=True)
class LinearProduct(Product):
    """``x @ wᵀ`` over the last axis. ``transposed``: the layer stores (in, out)."""

    transposed: bool = False

    channel_axis = -1
    name = "linear"

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.t() if self.transposed else weight

    def stored(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.t() if self.transposed else rows

    def in_float(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return functional.linear(x, self.rows(weight), bias)

    def channels_meet_batch_norm(self, x: torch.Tensor) -> bool:
        return x.dim() == 2

    def __call__(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        s: torch.Tensor,
        b: torch.Tensor,
        group_size: int | None,
        wide: bool,
    ) -> torch.Tensor:
        out: torch.Tensor
        if group_size is None:
            out = torch.ops.apot_fx.linear(x, w, s, b, wide)
        else:
            out = torch.ops.apot_fx.linear_grouped(x, w, s, b, group_size, wide)
        return out

    def weight_only(
        self, x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, group_size: int
    ) -> torch.Tensor:
        out: torch.Tensor = torch.ops.apot_fx.linear_weight_only(x.float(), w, s, b, group_size)
        return out


@dataclasses.dataclass(frozen=True)
class LeftProduct(LinearProduct):
    """``w @ x``, channels on the last axis but one."""

    channel_axis = -2
    name = "matmul"

    def in_float(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        y = torch.matmul(self.rows(weight), x)
        return y if bias is None else y + bias.unsqueeze(-1)

    def channels_meet_batch_norm(self, x: torch.Tensor) -> bool:
        return x.dim() == 3

    def __call__(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return _turned(super().__call__(_turned(x), *rest))

    def weight_only(self, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return _turned(super().weight_only(_turned(x), *rest))


def _turned(x: torch.Tensor) -> torch.Tensor:
    return x.mT.contiguous() if x.dim() > 1 else x
