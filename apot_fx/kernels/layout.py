"""How a tensor lies in memory: as runs of values that share an α."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as functional


class Layout(NamedTuple):
    """Memory order as ``outer`` × ``channels`` × ``inner`` values, α running along ``channels``.

    With ``row``, a channel is one group of ``inner`` values of a row of ``row``; a row's last
    group may be short.
    """

    outer: int
    channels: int
    inner: int
    row: int = 0


def memory_order(x: torch.Tensor) -> list[int] | None:
    """The dimensions from the outermost to the innermost, those of size 1 left out.

    None where the values are not dense: then they are gapped, or some share a place.
    """
    dims = [dim for dim, size in enumerate(x.shape) if size != 1]
    order = sorted(dims, key=x.stride, reverse=True)
    expected = 1
    for dim in reversed(order):
        if x.stride(dim) != expected:
            return None
        expected *= x.shape[dim]
    return order


def layout_of(x: torch.Tensor, axis: int | None) -> Layout | None:
    """Where α runs along ``axis`` (None: one α); None where ``x`` is not dense."""
    if axis is None and x.is_contiguous():
        return Layout(1, 1, x.numel())
    if not x.numel():
        return Layout(1, 1, 0) if axis is None else Layout(0, x.shape[axis], 1)
    order = memory_order(x)
    if order is None:
        return None
    if axis is None or axis % x.dim() not in order:
        return Layout(1, 1, x.numel())
    place = order.index(axis % x.dim())
    sizes = [x.shape[dim] for dim in order]
    return Layout(math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :]))


def dense(x: torch.Tensor, axis: int | None) -> tuple[torch.Tensor, Layout]:
    """``x``, or where it is not dense a copy with the strides of ``empty_like``; and its layout."""
    layout = layout_of(x, axis)
    if layout is None:
        x = torch.empty_like(x).copy_(x)
        layout = layout_of(x, axis)
        assert layout is not None
    return x, layout


class Gaps(NamedTuple):
    """Rows of ``row`` values that start ``stride`` values apart; ``row`` 0: no gaps."""

    row: int = 0
    stride: int = 0


def gaps_of(x: torch.Tensor) -> Gaps | None:
    """The gaps of a tensor whose values are long rows at even distances, in the order of memory.

    None where they are dense or lie otherwise.
    """
    order = sorted((dim for dim, size in enumerate(x.shape) if size != 1), key=x.stride)
    row = 1
    while order and x.stride(order[0]) == row:
        row *= x.shape[order.pop(0)]
    if not order or row < _WORTH_ROW:
        return None
    stride = expected = x.stride(order[0])
    for dim in order:
        if x.stride(dim) != expected:
            return None
        expected *= x.shape[dim]
    return Gaps(row, stride) if stride > row else None


#: Shorter rows are copied faster than they are read one by one.
_WORTH_ROW = 64


def rows_of(x: torch.Tensor, axis: int | None, group_size: int | None) -> torch.Tensor:
    """One row of values per α in logical order; short groups are filled up with zeros."""
    if axis is None:
        return x.reshape(1, -1)
    rows = x.movedim(axis, 0)
    rows = rows.flatten(1) if rows.dim() > 1 else rows.unsqueeze(1)
    if group_size is None:
        return rows
    return functional.pad(rows, (0, -rows.shape[1] % group_size)).reshape(-1, group_size)
