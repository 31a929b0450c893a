"""The quantizer's arithmetic in plain, vectorised torch (contract 4.1 to 4.5).

Functions take the level set's spec string, since operators pass it; lookup tables are kept per
(spec, device). They are defined on the half-unit grid: thresholds ``q_i + q_{i+1}`` are integers
there, so a table look-up after ``ceil`` is exact, and ties go to the lower level.
"""

from __future__ import annotations

import bisect
import functools
import math

import torch
import torch.nn.functional as functional

from ..levels import LevelSet
from .sums import reduce_to_alpha

ALPHA_MIN, ALPHA_MAX = 2.0**-40, 2.0**40

#: Units up to here have a half-unit table; larger ones search, in float64.
TABLE_UNIT = 2**15


@functools.lru_cache(maxsize=256)
def index_table(spec: str, device: torch.device) -> torch.Tensor:
    """Index of every half-unit from ``2·q_min`` to ``2·q_max``; uint8 or int16."""
    levels = LevelSet.parse(spec)
    halves = range(2 * levels.q_min, 2 * levels.q_max + 1)
    found = [bisect.bisect_left(levels.thresholds, half) for half in halves]
    return torch.tensor(found, dtype=index_dtype(spec), device=device)


@functools.lru_cache(maxsize=256)
def level_table(spec: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Integer level of every index."""
    return torch.tensor(LevelSet.parse(spec).levels, device=device).to(dtype)


@functools.lru_cache(maxsize=256)
def half_unit_levels(spec: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Integer level of every half-unit: both tables in one look-up."""
    return level_table(spec, device, dtype)[index_table(spec, device).long()]


def index_dtype(spec: str) -> torch.dtype:
    """uint8 up to 256 levels, else int16."""
    return torch.uint8 if LevelSet.parse(spec).index_dtype == "uint8" else torch.int16


def working_dtype(x: torch.Tensor) -> torch.dtype:
    """float64 stays; everything narrower is widened, exactly, to float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def spread(
    alpha: torch.Tensor, x: torch.Tensor, axis: int | None, group_size: int | None
) -> torch.Tensor:
    """α, clamped to its limits, of a shape that broadcasts to ``x``."""
    alpha = alpha.clamp(ALPHA_MIN, ALPHA_MAX)
    if axis is None:
        return alpha.reshape(())
    axis %= x.dim()
    if group_size is None:
        return alpha.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])
    rest = [size for dim, size in enumerate(x.shape) if dim != axis]
    count = 1
    for size in rest:
        count *= size
    wide = alpha.repeat_interleave(group_size, dim=1)[:, :count]
    return wide.reshape(x.shape[axis], *rest).movedim(0, axis)


def step_of(alpha: torch.Tensor, unit: int) -> torch.Tensor:
    """``fl(α / M)``. Both are tensors, since GPUs divide by a number through its reciprocal."""
    return torch.div(alpha, alpha.new_full((), float(unit)))


def per_alpha(unit: int, alpha: torch.Tensor) -> torch.Tensor:
    """``fl(unit / α)`` by one IEEE division: ``number / tensor`` would round a reciprocal first."""
    return torch.div(alpha.new_full((), float(unit)), alpha)


def half_units(
    x: torch.Tensor, alpha: torch.Tensor, spec: str, axis: int | None, group_size: int | None
) -> torch.Tensor:
    """``clamp(ceil(fl(x · fl(2M/α))), 2·q_min, 2·q_max)``, NaN as 0; float of x's strides."""
    levels, dtype = LevelSet.parse(spec), working_dtype(x)
    if levels.unit > TABLE_UNIT:
        dtype = torch.float64
    x = x.to(dtype)
    scale = per_alpha(2 * levels.unit, spread(alpha.to(dtype), x, axis, group_size))
    t = (x * scale).ceil_().clamp_(2 * levels.q_min, 2 * levels.q_max)
    return t.nan_to_num_(nan=0.0)


def look_up(table: torch.Tensor, place: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``table[place]``, laid out in memory as ``empty_like(like)`` is."""
    out = torch.empty_like(like, dtype=table.dtype)
    if out.stride() == place.stride() and _is_dense(place):
        flat, count = place.as_strided((place.numel(),), (1,)), place.numel()
        torch.index_select(table, 0, flat, out=out.as_strided((count,), (1,)))
        return out
    return out.copy_(table[place.long()])


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or (
        x.numel() > 0
        and x.numel() == 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    )


def quantize(
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """Indices (contract 4.1); NaN gives the zero level's, ±inf clips."""
    if axis == 0 and x.device.type == "cpu" and x.numel() > 2 * _PART and len(x) > 1:
        return _quantize_rows(x, alpha, spec, group_size)
    levels, half = LevelSet.parse(spec), half_units(x, alpha, spec, axis, group_size)
    if levels.unit > TABLE_UNIT:
        thresholds = torch.tensor(levels.thresholds, dtype=torch.float64, device=x.device)
        found = torch.searchsorted(thresholds, half.contiguous())
        return torch.empty_like(x, dtype=index_dtype(spec)).copy_(found)
    place = (half - 2 * levels.q_min).to(torch.int32)
    return look_up(index_table(spec, x.device), place, x)


def _quantize_rows(
    x: torch.Tensor, alpha: torch.Tensor, spec: str, group_size: int | None
) -> torch.Tensor:
    """Some rows at a time: a weight's temporaries would take several times its own memory."""
    out = torch.empty_like(x, dtype=index_dtype(spec))
    rows = max(1, _PART // max(1, x.numel() // len(x)))
    parts = zip(x.split(rows), alpha.split(rows), out.split(rows), strict=True)
    for part, clip, place in parts:
        place.copy_(quantize(part, clip, spec, 0, group_size))
    return out


def to_level(index: torch.Tensor, spec: str, dtype: torch.dtype) -> torch.Tensor:
    """The integer levels of indices, as floats."""
    return look_up(level_table(spec, index.device, dtype), index.to(torch.int32), index)


def dequantize(
    index: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """``fl(q · fl(α/M))`` (contract 4.2), float32, or float64 where α is."""
    unit, wanted = LevelSet.parse(spec).unit, working_dtype(alpha)
    dtype = torch.float64 if unit > TABLE_UNIT else wanted
    step = step_of(spread(alpha.to(dtype), index, axis, group_size), unit)
    if axis is None:
        values = (level_table(spec, index.device, dtype) * step).to(wanted)
        return look_up(values, index.to(torch.int32), index)
    return _like(to_level(index, spec, dtype).mul_(step).to(wanted), index)


def _like(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(like, dtype=values.dtype)
    return values if values.stride() == out.stride() else out.copy_(values)


def fake_quantize(
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None = None,
    group_size: int | None = None,
    grad: str = "ste",
    nan_to_zero: bool = False,
) -> torch.Tensor:
    """``dequantize(quantize(x))`` in one look-up.

    In the train form NaN stays and the result has x's dtype; with ``nan_to_zero`` (eval) NaN
    becomes zero and the result is float32 (float64 for float64).
    """
    if axis is None and in_parts(x):
        out = torch.empty_like(x, dtype=working_dtype(x) if nan_to_zero else x.dtype)
        for part, place in zip(parts(x), parts(out), strict=True):
            place.copy_(fake_quantize(part, alpha, spec, None, None, grad, nan_to_zero))
        return out
    unit = LevelSet.parse(spec).unit
    if unit > TABLE_UNIT:
        index = quantize(x, alpha, spec, axis, group_size)
        y = dequantize(index, alpha, spec, axis, group_size).to(working_dtype(x))
    else:
        dtype, low = working_dtype(x), 2 * LevelSet.parse(spec).q_min
        place = (half_units(x, alpha, spec, axis, group_size) - low).to(torch.int32)
        step = step_of(spread(alpha.to(dtype), x, axis, group_size), unit)
        table = half_unit_levels(spec, x.device, dtype)
        shared = axis is None  # one α: scale the table, not every value
        y = look_up(table * step, place, x) if shared else look_up(table, place, x).mul_(step)
    if nan_to_zero:
        return _like(y, x)
    return _like(torch.where(x.isnan(), x.to(y.dtype), y).to(x.dtype), x)


def fake_quantize_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None,
    group_size: int | None,
    mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for x and α (contract 4.4); a NaN element gets and gives none."""
    dx, total = _backward(grad, x, alpha, spec, axis, group_size, mode)
    return dx, led_back(total.to(alpha.dtype), alpha)


def led_back(dalpha: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """An α outside its limits only receives a gradient that leads it back."""
    dalpha = torch.where(alpha < ALPHA_MIN, dalpha.clamp(max=0), dalpha)
    return torch.where(alpha > ALPHA_MAX, dalpha.clamp(min=0), dalpha)


def _backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None,
    group_size: int | None,
    mode: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient for x, and for α in float64 whatever its limits."""
    levels, dtype = LevelSet.parse(spec), working_dtype(x)
    wide, clip = x.to(dtype), spread(alpha.to(dtype), x, axis, group_size)
    step = step_of(clip, levels.unit)
    above = wide > levels.q_max * step
    inside = ~above & (wide >= levels.q_min * step)
    dx = _like(torch.where(inside, grad.to(dtype), 0.0).to(x.dtype), x)
    if mode == "ste":
        return dx, torch.zeros_like(alpha, dtype=torch.float64)
    if levels.unit > TABLE_UNIT:
        q = to_level(quantize(x, alpha, spec, axis, group_size), spec, dtype)
    else:
        place = (half_units(x, alpha, spec, axis, group_size) - 2 * levels.q_min).to(torch.int32)
        q = look_up(half_unit_levels(spec, x.device, dtype), place, x)
    share = (q / levels.unit).sub_((wide / clip).mul_(inside).nan_to_num_(nan=0.0))
    share = _like(share.mul_(grad.to(dtype)), x)
    return dx, reduce_to_alpha(share, alpha, axis, group_size)


def ends(x: torch.Tensor) -> torch.Tensor:
    """The smallest and the largest finite value along the last axis, float32, ``(2, …)``.

    inf and −inf where none is finite.
    """
    x = functional.pad(x.float(), (0, 1), value=float("nan")) if not x.shape[-1] else x.float()
    finite, infinity = x.isfinite(), float("inf")
    low = x.masked_fill(~finite, infinity).amin(-1)
    return torch.stack((low, x.masked_fill(~finite, -infinity).amax(-1)))


#: Bins of a histogram: so many per octave (a power of two), in octaves from 2^-40 to 2^40.
SUB_BITS, OCTAVES = 5, 80
BINS = OCTAVES << SUB_BITS
_FIRST_BIN = (127 - 40) << SUB_BITS


def histogram(x: torch.Tensor) -> torch.Tensor:
    """How many finite values along the last axis fall into each bin of magnitudes.

    int64, ``(…, 2, BINS)``: positive, then negative values. Magnitudes below 2^-40 fall into the
    first bin, from 2^40 on into the last.
    """
    rows = x.float().reshape(math.prod(x.shape[:-1]), x.shape[-1])
    finite = rows.isfinite()
    bits = rows.abs().contiguous().view(torch.int32) >> (23 - SUB_BITS)
    place = (bits - _FIRST_BIN).clamp(0, BINS - 1).long()
    row = torch.arange(len(rows), device=rows.device).unsqueeze(1)
    place = (2 * row + (rows < 0).long()) * BINS + place
    counts = torch.bincount(place[finite], minlength=2 * BINS * len(rows))
    return counts.reshape(*x.shape[:-1], 2, BINS)


#: Values per part: a chain of passes over so many stays in the cache, 3 times as fast.
_PART = 2**18


def in_parts(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() > 2 * _PART and _is_dense(x)


def parts(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A dense tensor's values in memory order, in 1-d parts."""
    return x.as_strided((x.numel(),), (1,)).split(_PART)


def to_levels(
    x: torch.Tensor,
    alpha: torch.Tensor,
    spec: str,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """The integer level of a value on the grid, ``rint(x · fl(M/α))``, float32; exact to 2^15."""
    dtype = working_dtype(x)
    unit = LevelSet.parse(spec).unit
    scale = per_alpha(unit, spread(alpha.to(dtype), x, axis, group_size))
    return _like((x.to(dtype) * scale).round_().to(torch.float32), x)
