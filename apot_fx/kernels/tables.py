"""A level set's tables as the compiled kernels read them (``apot_set`` of ``native/apot.h``)."""

from __future__ import annotations

import ctypes
import functools

import torch

from ..levels import LevelSet
from . import reference

_SHIFT, _BYTES, _TABLE = 0, 1, 2

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
def set_address(spec: str, indices: bool) -> int:
    """Where the compiled kernels find a set; 0 where they can't take it."""
    found = _tables(spec)
    if found is None or (indices and len(LevelSet.parse(spec)) > 256):
        return 0
    return found[0]
