"""Who computes: the compiled kernels where they can, the reference elsewhere; the same bits.

The compiled kernels take float32, bfloat16 and float16 on the CPU, with α in float32, and sets of
up to 256 levels where indices go in or out.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ..levels import LevelSet
from . import native, packing, reference
from .layout import Gaps, Layout, dense, gaps_of, layout_of
from .tables import set_address

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_LIBRARY = native.loaded()


class _Rows:
    """A tensor as the kernels take it: dense, in an order in which α runs simply."""

    def __init__(self, x: torch.Tensor, axis: int | None, group_size: int | None) -> None:
        self.like = x
        self.axis = axis if group_size is not None else None  # rows by group are copied
        if group_size is None:
            x, layout = dense(x, axis)
        else:
            assert axis is not None
            rows = x.movedim(axis, 0)
            x = rows if rows.is_contiguous() else rows.contiguous()
            row = x.numel() // max(1, len(x))
            groups = -(-row // group_size)
            layout = Layout(1, len(x) * groups, group_size, row)
        self.x, self.layout = x, layout

    def matching(self, other: torch.Tensor) -> torch.Tensor:
        """Another tensor of the shape of ``like``, laid out as ``x`` is."""
        if self.axis is not None:
            other = other.movedim(self.axis, 0)
        same = other.stride() == self.x.stride()
        return other if same else torch.empty_like(self.x, dtype=other.dtype).copy_(other)

    def empty(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_like(self.x, dtype=dtype)

    def restored(self, out: torch.Tensor) -> torch.Tensor:
        """A result, laid out as ``empty_like(like)`` is."""
        if self.axis is None:
            return out
        wanted = torch.empty_like(self.like, dtype=out.dtype)
        moved = out.movedim(0, self.axis)
        return moved if moved.stride() == wanted.stride() else wanted.copy_(moved)


def _are_values(x: torch.Tensor) -> bool:
    return x.is_cpu and x.dtype in _DTYPES and x.layout is torch.strided


def _are_bytes(x: torch.Tensor) -> bool:
    return x.is_cpu and x.dtype is torch.uint8


def _fits(shape: torch.Size, alpha: torch.Tensor, axis: int | None, group_size: int | None) -> bool:
    """Whether α has one value for every channel or group. What does not fit is the reference's to
    broadcast or to refuse: it reads no memory that is not there."""
    if axis is None:
        return group_size is None and alpha.numel() == 1
    if not -len(shape) <= axis < len(shape):
        return False
    channels = shape[axis]
    if group_size is None:
        return alpha.shape == (channels,)
    row = math.prod(shape) // max(1, channels)
    return group_size > 0 and alpha.shape == (channels, -(-row // group_size))


def _address(
    shape: torch.Size,
    alpha: torch.Tensor,
    spec: str,
    where: tuple[int | None, int | None],
    indices: bool,
) -> int:
    """Where the set's tables are for the compiled kernels; 0 where they don't take such an α."""
    taken = _LIBRARY is not None and alpha.dtype is torch.float32 and alpha.is_cpu
    return set_address(spec, indices) if taken and _fits(shape, alpha, *where) else 0


def _forward(
    name: str,
    x: torch.Tensor,
    alpha: torch.Tensor,
    address: int,
    where: tuple[int | None, int | None],
    dtype: torch.dtype,
    *kinds: int,
) -> torch.Tensor:
    """A kernel that gives a value for every value."""
    clip = alpha.contiguous()
    gaps = gaps_of(x) if where[1] is None and x.numel() and not x.is_contiguous() else None
    if gaps is not None:  # rows that are read where they are
        out = torch.empty_like(x, dtype=dtype)
        layout = layout_of(out, where[0])
        assert layout is not None
        at = (x.data_ptr(), out.data_ptr(), clip.data_ptr(), address)
        _run(name, *at, *layout, *gaps, *kinds)
        return out
    rows = _Rows(x, *where)
    out = rows.empty(dtype)
    at = (rows.x.data_ptr(), out.data_ptr(), clip.data_ptr(), address)
    _run(name, *at, *rows.layout, *Gaps(), *kinds)
    return rows.restored(out)


def _run(name: str, *args: Any) -> None:
    assert _LIBRARY is not None
    if not getattr(_LIBRARY.library, name)(*args, _LIBRARY.threads()):
        raise MemoryError(f"apot_fx: {name} found no memory for its tables")


def fake_quantize(
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None = None,
    group_size: int | None = None,
    grad: str = "ste",
    nan_to_zero: bool = False,
) -> torch.Tensor:
    """As :func:`reference.fake_quantize`."""
    address = _address(x.shape, alpha, spec, (axis, group_size), indices=False)
    if not address or not _are_values(x):
        return reference.fake_quantize(x, alpha, spec, axis, group_size, grad, nan_to_zero)
    dtype = torch.float32 if nan_to_zero else x.dtype
    kinds = (_DTYPES[x.dtype], _DTYPES[dtype], nan_to_zero)
    return _forward("apot_fake_quantize", x, alpha, address, (axis, group_size), dtype, *kinds)


def fake_quantize_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None,
    group_size: int | None,
    mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`reference.fake_quantize_backward`."""
    address = _address(x.shape, alpha, spec, (axis, group_size), indices=False)
    alike = grad.dtype is x.dtype and grad.shape == x.shape and grad.is_cpu
    if not address or not _are_values(x) or not alike:
        return reference.fake_quantize_backward(grad, x, alpha, spec, axis, group_size, mode)
    rows = _Rows(x, axis, group_size)
    given = rows.matching(grad)
    dx, clip = rows.empty(x.dtype), alpha.contiguous()
    dalpha = torch.empty_like(clip) if mode == "rcf" else torch.zeros_like(clip)
    at = (rows.x.data_ptr(), given.data_ptr(), dx.data_ptr(), clip.data_ptr())
    place = dalpha.data_ptr() if mode == "rcf" else None
    _run("apot_backward", *at, place, address, *rows.layout, _DTYPES[x.dtype])
    return rows.restored(dx), dalpha


def quantize(
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """As :func:`reference.quantize`."""
    address = _address(x.shape, alpha, spec, (axis, group_size), indices=True)
    if not address or not _are_values(x):
        return reference.quantize(x, alpha, spec, axis, group_size)
    kinds = (_DTYPES[x.dtype], 0)
    return _forward("apot_quantize", x, alpha, address, (axis, group_size), torch.uint8, *kinds)


def quantize_packed(
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """``pack(quantize(…))`` at the set's stored bits."""
    where = (axis, group_size)
    taken = x.is_contiguous() and _are_values(x)
    address = _address(x.shape, alpha, spec, where, indices=True) if taken else 0
    rows = _Rows(x, axis, group_size) if address else None
    # Logical order is memory order, and no value has an α of its own.
    if rows is None or rows.x.data_ptr() != x.data_ptr() or rows.layout.inner == 1:
        index = quantize(x, alpha, spec, axis, group_size)
        return pack(index, LevelSet.parse(spec).bits)
    bits, clip = LevelSet.parse(spec).bits, alpha.contiguous()
    out = torch.empty(packing.packed_size(x.numel(), bits), dtype=torch.uint8)
    at = (x.data_ptr(), out.data_ptr(), clip.data_ptr(), address)
    _run("apot_quantize", *at, *rows.layout, *Gaps(), _DTYPES[x.dtype], bits)
    return out


def dequantize(
    index: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """As :func:`reference.dequantize`."""
    where = (axis, group_size)
    address = _address(index.shape, alpha, spec, where, indices=True) if _are_bytes(index) else 0
    if not address or not _are_indices(index, len(LevelSet.parse(spec))):
        return reference.dequantize(index, alpha, spec, axis, group_size)
    return _forward("apot_dequantize", index, alpha, address, where, torch.float32)


def _are_indices(index: torch.Tensor, count: int) -> bool:
    return count == 256 or not index.numel() or int(index.max()) < count


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the compiled kernels can read a tensor in whatever order it lies in memory."""
    return _LIBRARY is not None and _are_values(x) and layout_of(x, None) is not None


def ends(x: torch.Tensor) -> torch.Tensor:
    """As :func:`reference.ends` of ``x.flatten()``."""
    if not _is_dense(x):
        return reference.ends(x.flatten())
    out = torch.empty(2)
    _run("apot_ends", x.data_ptr(), x.numel(), _DTYPES[x.dtype], out.data_ptr())
    return out


def histogram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``ends`` and :func:`reference.histogram` of ``x.flatten()``, in one pass."""
    if not _is_dense(x):
        flat = x.flatten()
        return reference.ends(flat), reference.histogram(flat)
    found, counts = torch.empty(2), torch.zeros(2, reference.BINS, dtype=torch.int64)
    at = (found.data_ptr(), counts.data_ptr())
    _run("apot_histogram", x.data_ptr(), x.numel(), _DTYPES[x.dtype], *at)
    return found, counts


class Led(NamedTuple):
    """What leads an α: the range seen so far, each a scalar tensor that is written in place.

    ``constant``: of a moving average of the batches' ranges; 0 for the range of all.
    """

    low: torch.Tensor
    high: torch.Tensor
    constant: float


def follow(
    x: torch.Tensor, alpha: torch.Tensor, spec: str, led: Led, nan_to_zero: bool
) -> torch.Tensor | None:
    """Take ``x`` into the range, set α by it in place, and fake-quantize; None: nothing done."""
    address = set_address(spec, False) if _is_dense(x) and _is_scalar(alpha, *led[:2]) else 0
    if not address:
        return None
    dtype = torch.float32 if nan_to_zero else x.dtype
    out = torch.empty_like(x, dtype=dtype)
    kinds = (x.numel(), _DTYPES[x.dtype], _DTYPES[dtype], nan_to_zero)
    at = (t.data_ptr() for t in (led.low, led.high, alpha))
    _run("apot_follow", x.data_ptr(), out.data_ptr(), *kinds, *at, address, led.constant)
    torch.autograd.graph.increment_version(alpha)
    return out


def _is_scalar(*tensors: torch.Tensor) -> bool:
    return all(t.dim() == 0 and t.is_cpu and t.dtype is torch.float32 for t in tensors)


def pack(index: torch.Tensor, bits: int) -> torch.Tensor:
    """As :func:`packing.pack`."""
    if _LIBRARY is None or not 1 <= bits <= 8 or not _are_bytes(index):
        return packing.pack(index, bits)
    flat = index.contiguous()
    out = torch.empty(packing.packed_size(flat.numel(), bits), dtype=torch.uint8)
    _run("apot_pack", flat.data_ptr(), out.data_ptr(), flat.numel(), bits)
    return out


def unpack(packed: torch.Tensor, bits: int, shape: list[int]) -> torch.Tensor:
    """As :func:`packing.unpack`."""
    fits = 1 <= bits <= 8 and packed.numel() == packing.packed_size(math.prod(shape), bits)
    if _LIBRARY is None or not fits or not _are_bytes(packed):
        return packing.unpack(packed, bits, shape)
    flat, out = packed.contiguous(), torch.empty(shape, dtype=torch.uint8)
    _run("apot_unpack", flat.data_ptr(), out.data_ptr(), out.numel(), bits)
    return out
