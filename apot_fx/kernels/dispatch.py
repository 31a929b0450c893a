"""Who computes: the compiled kernels where they can, the reference elsewhere; the same bits.

The compiled kernels take float32, bfloat16 and float16 on the CPU, with α in float32, and sets of
up to 256 levels where indices go in or out.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any, NamedTuple

import torch

from ..levels import LevelSet
from . import native, packing, reference
from .layout import Gaps, Layout, dense, gaps_of, layout_of

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SHIFT, _BYTES, _TABLE = 0, 1, 2
_LIBRARY = native.loaded()
_FLOAT = torch.empty(0)


_TABLES = (
    "levels indices by_index level_bytes index_bytes index_levels level_line index_line"
).split()


class _Set(ctypes.Structure):
    """``apot_set`` of ``apot.h``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in "low high unit look count".split()),
        *((name, ctypes.c_void_p) for name in _TABLES),
    )


@functools.lru_cache(maxsize=256)
def _tables(spec: str) -> tuple[int, _Set, list[torch.Tensor]] | None:
    """Where a level set's tables are, and what keeps them alive; None where they'd be too large."""
    levels = LevelSet.parse(spec)
    if levels.unit > reference.TABLE_UNIT:
        return None
    cpu = torch.device("cpu")
    by_half = reference.half_unit_levels(spec, cpu, torch.float32).clone()
    indices = reference.index_table(spec, cpu).to(torch.int32)
    by_index = torch.zeros(256)
    some = torch.tensor(levels.levels[:256], dtype=torch.float32)
    by_index[: len(some)] = some
    look = _TABLE
    kinds = (torch.int8, torch.uint8, torch.int8, torch.int8, torch.uint8)
    small = [torch.zeros(256, dtype=kind) for kind in kinds]
    if list(levels.levels) == list(range(levels.q_min, levels.q_max + 1)):
        look = _SHIFT
    elif 2 * levels.q_min >= -128 and 2 * levels.q_max < 128:
        look = _BYTES
        half = torch.arange(2 * levels.q_min, 2 * levels.q_max + 1)
        place = half % (128 if len(half) <= 128 else 256)
        small[0][place], small[1][place] = by_half.to(torch.int8), indices.to(torch.uint8)
        small[2][: len(some)] = some.to(torch.int8)
        small[3][: len(half)], small[4][: len(half)] = by_half.to(torch.int8), indices
    tables = [by_half, indices, by_index, *small]
    made = _Set(
        2 * levels.q_min,
        2 * levels.q_max,
        levels.unit,
        look,
        len(levels),
        *(table.data_ptr() for table in tables),
    )
    return ctypes.addressof(made), made, tables


@functools.lru_cache(maxsize=256)
def _set_address(spec: str, indices: bool) -> int:
    """Where the compiled kernels find a set; 0 where they can't take it."""
    found = _tables(spec)
    if found is None or (indices and len(LevelSet.parse(spec)) > 256):
        return 0
    return found[0]


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


def _takes(x: torch.Tensor, alpha: torch.Tensor) -> bool:
    plain = x.is_cpu and x.dtype in _DTYPES and x.layout is torch.strided
    return plain and alpha.dtype is torch.float32 and alpha.is_cpu


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
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    where: tuple[int | None, int | None],
    indices: bool,
) -> int:
    """Where the set's tables are for the compiled kernels; 0 where they don't take the call."""
    if _LIBRARY is None or not _takes(x, alpha) or not _fits(x.shape, alpha, *where):
        return 0
    return _set_address(spec, indices)


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
    clip, gaps = alpha.contiguous(), None
    if where[1] is None and x.numel() and not x.is_contiguous():
        gaps = gaps_of(x)
    if gaps is not None and gaps.row:
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
    address = _address(x, alpha, spec, (axis, group_size), indices=False)
    if not address:
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
    address = _address(x, alpha, spec, (axis, group_size), indices=False)
    alike = grad.dtype is x.dtype and grad.shape == x.shape and grad.is_cpu
    if not address or not alike:
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
    address = _address(x, alpha, spec, (axis, group_size), indices=True)
    if not address:
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
    address = _address(x, alpha, spec, where, indices=True) if x.is_contiguous() else 0
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
    plain = index.dtype is torch.uint8 and index.is_cpu and _takes(_FLOAT, alpha)
    fits = plain and _LIBRARY is not None and _fits(index.shape, alpha, axis, group_size)
    address = _set_address(spec, True) if fits else 0
    if not address or not _are_indices(index, len(LevelSet.parse(spec))):
        return reference.dequantize(index, alpha, spec, axis, group_size)
    return _forward("apot_dequantize", index, alpha, address, (axis, group_size), torch.float32)


def _are_indices(index: torch.Tensor, count: int) -> bool:
    return count == 256 or not index.numel() or int(index.max()) < count


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the compiled kernels can read a tensor in whatever order it lies in memory."""
    return _LIBRARY is not None and _takes(x, _FLOAT) and layout_of(x, None) is not None


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
    address = _set_address(spec, False) if _is_dense(x) and _is_scalar(alpha, *led[:2]) else 0
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


def _are_bytes(x: torch.Tensor) -> bool:
    return x.is_cpu and x.dtype is torch.uint8


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
