"""Convolutions and transposed convolutions as products, 1-d to 3-d."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

from ..errors import TensorError
from ..kernels.products import swap_channels
from .products import Product


@dataclasses.dataclass(frozen=True)
class _Convolution(Product):
    """What both directions have in common: geometry over the trailing ``rank`` axes."""

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.stride)

    @property
    def channel_axis(self) -> int:  # type: ignore[override]
        return -1 - self.rank

    def channels_meet_batch_norm(self, x: torch.Tensor) -> bool:
        return x.dim() == self.rank + 2

    def _patches(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """What every output sees of a batched ``x``: (batch, channels, *places, *kernel)."""
        raise NotImplementedError

    def weight_only(
        self, x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, group_size: int
    ) -> torch.Tensor:
        """Every output is one row of contract 4.8: its patch, in the weight's own order."""
        rank = self.rank
        batched = x.dim() == rank + 2
        patches = self._patches((x if batched else x.unsqueeze(0)).float(), w)
        places = tuple(patches.shape[2 : 2 + rank])
        order = (0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))
        inputs = patches.permute(order).flatten(1, rank).flatten(2)
        rows = [
            torch.ops.apot_fx.linear_weight_only(part, weight, scale, offset, group_size)
            for part, weight, scale, offset in zip(
                inputs.chunk(self.groups, dim=-1),
                w.flatten(1).chunk(self.groups),
                s.chunk(self.groups),
                b.chunk(self.groups),
                strict=True,
            )
        ]
        out = torch.cat(rows, dim=-1).transpose(1, 2).unflatten(2, places)
        return out if batched else out.squeeze(0)


@dataclasses.dataclass(frozen=True)
class ConvProduct(_Convolution):
    """A convolution; ``padding`` is symmetric zeros, done by the convolution."""

    border: tuple[int, ...]  # what functional.pad does first; () for nothing
    border_mode: str

    @classmethod
    def of(cls, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> ConvProduct:
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
    def name(self) -> str:  # type: ignore[override]
        return f"conv{self.rank}d"

    def in_float(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        call = (functional.conv1d, functional.conv2d, functional.conv3d)[self.rank - 1]
        x = self._bordered(x)
        return call(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def __call__(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        s: torch.Tensor,
        b: torch.Tensor,
        group_size: int | None,
        wide: bool,
    ) -> torch.Tensor:
        x = self._bordered(x)
        geometry = (list(self.stride), list(self.padding), list(self.dilation), self.groups)
        out: torch.Tensor
        if group_size is None:
            out = torch.ops.apot_fx.conv(x, w, s, b, *geometry, wide)
        else:
            out = torch.ops.apot_fx.conv_grouped(x, w, s, b, *geometry, group_size, wide)
        return out

    def _patches(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        border = [edge for size in reversed(self.padding) for edge in (size, size)]
        x = functional.pad(self._bordered(x), border)
        return _windows(x, w.shape[2:], self.stride, self.dilation)

    def _bordered(self, x: torch.Tensor) -> torch.Tensor:
        return functional.pad(x, self.border, mode=self.border_mode) if self.border else x


@dataclasses.dataclass(frozen=True)
class TransposedProduct(_Convolution):
    """A transposed convolution; the layer stores ``(in, out/groups, …)`` (contract 4.13)."""

    output_padding: tuple[int, ...]

    @classmethod
    def of(cls, layer: nn.modules.conv._ConvTransposeNd) -> TransposedProduct:
        """The geometry of a torch layer."""
        rank = len(layer.stride)
        geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
        return cls.of_call(rank, *geometry)

    @classmethod
    def of_call(
        cls, rank: int, stride: Any, padding: Any, output_padding: Any, groups: int, dilation: Any
    ) -> TransposedProduct:
        """The geometry of a ``functional.conv_transpose…`` call over ``rank`` axes."""
        return cls(
            stride=_tuple(stride, rank),
            dilation=_tuple(dilation, rank),
            groups=groups,
            padding=_tuple(padding, rank),
            output_padding=_tuple(output_padding, rank),
        )

    def sized(self, x: torch.Tensor, kernel: Any, output_size: Any) -> TransposedProduct:
        """The same with the output padding that gives ``output_size`` (a call's argument)."""
        if output_size is None:
            return self
        wanted = tuple(output_size)[-self.rank :]
        smallest = [
            (n - 1) * stride - 2 * padding + dilation * (size - 1) + 1
            for n, stride, padding, dilation, size in zip(
                x.shape[-self.rank :], self.stride, self.padding, self.dilation, kernel, strict=True
            )
        ]
        extra = tuple(w - least for w, least in zip(wanted, smallest, strict=False))
        fits = len(extra) == self.rank and len(tuple(output_size)) in (self.rank, x.dim())
        if not fits or any(not 0 <= e < s for e, s in zip(extra, self.stride, strict=True)):
            largest = [n + s - 1 for n, s in zip(smallest, self.stride, strict=True)]
            raise TensorError(
                f"{self.name}: output_size {tuple(output_size)}, but sizes from {smallest} to "
                f"{largest} are possible for an input of {tuple(x.shape)}"
            )
        return dataclasses.replace(self, output_padding=extra)

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"conv_transpose{self.rank}d"

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        return swap_channels(weight, self.groups)

    def stored(self, rows: torch.Tensor) -> torch.Tensor:
        return swap_channels(rows, self.groups)

    @property
    def _geometry(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.stride), list(self.padding), list(self.output_padding)

    def in_float(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        calls = (
            functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d
        )  # fmt: skip
        call, dilation = calls[self.rank - 1], list(self.dilation)
        return call(x, weight, bias, *self._geometry, self.groups, dilation)

    def __call__(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        s: torch.Tensor,
        b: torch.Tensor,
        group_size: int | None,
        wide: bool,
    ) -> torch.Tensor:
        geometry = (*self._geometry, list(self.dilation), self.groups)
        out: torch.Tensor
        if group_size is None:
            out = torch.ops.apot_fx.conv_transpose(x, w, s, b, *geometry, wide)
        else:
            out = torch.ops.apot_fx.conv_transpose_grouped(x, w, s, b, *geometry, group_size, wide)
        return out

    def _patches(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Windows of the input with ``stride − 1`` zeros between, turned to the kernel's order.

        Kernel position k of output o meets input ``(o + padding − dilation·k) / stride``, or zero
        where there is none: a window runs the other way than the kernel.
        """
        kernel, rank = w.shape[2:], self.rank
        edges: list[int] = []
        for axis, stride in enumerate(self.stride):
            if stride > 1 and x.shape[2 + axis]:
                between = x.new_zeros(*x.shape[: 3 + axis], stride, *x.shape[3 + axis :])
                between.select(3 + axis, 0).copy_(x)
                x = between.flatten(2 + axis, 3 + axis)
                x = x.narrow(2 + axis, 0, x.shape[2 + axis] - stride + 1)
            low = self.dilation[axis] * (kernel[axis] - 1) - self.padding[axis]
            edges = [low, low + self.output_padding[axis], *edges]
        x = functional.pad(x, edges)  # negative edges cut
        windows = _windows(x, kernel, (1,) * rank, self.dilation)
        return windows.flip(tuple(range(2 + rank, 2 + 2 * rank)))


def _windows(
    x: torch.Tensor, kernel: Any, stride: tuple[int, ...], dilation: tuple[int, ...]
) -> torch.Tensor:
    """(batch, channels, *spatial) to (batch, channels, *places, *kernel)."""
    for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, apart * (size - 1) + 1, step)
        x = x[..., ::apart] if apart > 1 else x
    return x


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
