"""How a tensor lies in memory: as runs of values that share an α."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


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
