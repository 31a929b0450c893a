"""The multiply-accumulate kinds that layers are made of: linear and convolution.

A kind is a frozen value shared by the prepared and the converted form of a layer, so that both
call the same operator with the same geometry.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import nn

from ..levels import LevelSet

#: Sums of integers up to here are exact in float32.
EXACT_SUM = 2**24


def largest_sum(levels: torch.Tensor, inputs: LevelSet) -> float:
    """The largest partial sum that any input can give, from the weights themselves."""
    rows = levels.flatten(1).double()
    positive, negative = rows.clamp(min=0).sum(1), rows.clamp(max=0).neg().sum(1)
    worst = positive + negative if inputs.signed else torch.maximum(positive, negative)
    return inputs.unit * float(worst.max()) if worst.numel() else 0.0


@dataclasses.dataclass(frozen=True)
class LinearProduct:
    """``x @ wᵀ`` over the last axis."""

    channel_axis: ClassVar[int] = -1
    name: ClassVar[str] = "linear"

    def in_float(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """What torch computes."""
        return functional.linear(x, weight, bias)

    def channels_meet_batch_norm(self, x: torch.Tensor) -> bool:
        """Whether the output's channels lie on axis 1, as batch norm wants them."""
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
        """Levels in (integer-valued float32), ``fl(fl(acc) · s) + b`` out."""
        out: torch.Tensor
        if group_size is None:
            out = torch.ops.apot_fx.linear(x, w, s, b, wide)
        else:
            out = torch.ops.apot_fx.linear_grouped(x, w, s, b, group_size, wide)
        return out

    def weight_only(
        self, x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, group_size: int
    ) -> torch.Tensor:
        """Float activations times levels, in the documented summation order (contract 4.8)."""
        out: torch.Tensor = torch.ops.apot_fx.linear_weight_only(x.float(), w, s, b, group_size)
        return out


@dataclasses.dataclass(frozen=True)
class ConvProduct:
    """A convolution over the trailing ``len(stride)`` axes."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]  # symmetric zeros, done by the convolution
    border: tuple[int, ...]  # what functional.pad does first; () for nothing
    border_mode: str

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d) -> ConvProduct:
        """The geometry of a torch convolution, padding spelled out."""
        border = tuple(layer._reversed_padding_repeated_twice)
        symmetric = border[0::2] == border[1::2]
        plain = layer.padding_mode == "zeros" and symmetric
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        none = (0,) * len(layer.stride)
        return cls(
            stride=tuple(layer.stride),
            dilation=tuple(layer.dilation),
            groups=layer.groups,
            padding=tuple(reversed(border[0::2])) if plain else none,
            border=() if plain else border,
            border_mode=mode,
        )

    @classmethod
    def of_call(
        cls, rank: int, stride: Any, padding: Any, dilation: Any, groups: int, kernel: Any
    ) -> ConvProduct:
        """The geometry of a ``functional.conv…`` call over ``rank`` axes."""
        border = _paddings(padding, rank, tuple(kernel), _tuple(dilation, rank))
        symmetric = all(low == high for low, high in border)
        flat = [edge for pair in reversed(border) for edge in pair]
        return cls(
            stride=_tuple(stride, rank),
            dilation=_tuple(dilation, rank),
            groups=groups,
            padding=tuple(low for low, _ in border) if symmetric else (0,) * rank,
            border=() if symmetric else tuple(flat),
            border_mode="constant",
        )

    @property
    def name(self) -> str:
        return f"conv{len(self.stride)}d"

    def in_float(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """What torch computes."""
        call = (functional.conv1d, functional.conv2d, functional.conv3d)[len(self.stride) - 1]
        x = self._bordered(x)
        return call(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    @property
    def channel_axis(self) -> int:
        return -1 - len(self.stride)

    def channels_meet_batch_norm(self, x: torch.Tensor) -> bool:
        """Whether the output's channels lie on axis 1, as batch norm wants them."""
        return x.dim() == len(self.stride) + 2

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
        x = self._bordered(x)
        geometry = (list(self.stride), list(self.padding), list(self.dilation), self.groups)
        out: torch.Tensor
        if group_size is None:
            out = torch.ops.apot_fx.conv(x, w, s, b, *geometry, wide)
        else:
            out = torch.ops.apot_fx.conv_grouped(x, w, s, b, *geometry, group_size, wide)
        return out

    def weight_only(
        self, x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, group_size: int
    ) -> torch.Tensor:
        """Float activations times levels: every output is one row of contract 4.8."""
        rank = len(self.stride)
        batched = x.dim() == rank + 2
        patches, places = self._patches((x if batched else x.unsqueeze(0)).float(), w)
        rows = [
            torch.ops.apot_fx.linear_weight_only(part, weight, scale, offset, group_size)
            for part, weight, scale, offset in zip(
                patches.chunk(self.groups, dim=-1),
                w.flatten(1).chunk(self.groups),
                s.chunk(self.groups),
                b.chunk(self.groups),
                strict=True,
            )
        ]
        out = torch.cat(rows, dim=-1).transpose(1, 2).unflatten(2, places)
        return out if batched else out.squeeze(0)

    def _patches(self, x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Input patches (batch, places, channels · kernel) and the output's spatial sizes."""
        border = [edge for size in reversed(self.padding) for edge in (size, size)]
        x = functional.pad(self._bordered(x), border)
        kernel = w.shape[2:]
        for axis, (size, stride, dilation) in enumerate(
            zip(kernel, self.stride, self.dilation, strict=True)
        ):
            span = dilation * (size - 1) + 1
            x = x.unfold(2 + axis, span, stride)
            x = x[..., ::dilation] if dilation > 1 else x
        rank = len(self.stride)
        places = tuple(x.shape[2 : 2 + rank])
        order = (0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))
        return x.permute(order).flatten(1, rank).flatten(2), places

    def _bordered(self, x: torch.Tensor) -> torch.Tensor:
        return functional.pad(x, self.border, mode=self.border_mode) if self.border else x


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    members = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return members * rank if len(members) == 1 else members


def _paddings(
    padding: Any, rank: int, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Zeros before and after each axis; "same" puts the odd one behind, as torch does."""
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    sizes = (0,) * rank if padding == "valid" else _tuple(padding, rank)
    return [(size, size) for size in sizes]


Product = LinearProduct | ConvProduct
