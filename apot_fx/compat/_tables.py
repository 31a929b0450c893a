"""Quantization parameters ↔ level sets: the one place where compat meets the library's arithmetic.

The original carries its levels as a sorted float tensor and the code of each beside it. Here they
are made from a :class:`LevelSet`, and found again in it: the operators below take the tensors that
users hold, find the set and α they mean, and call :mod:`apot_fx.kernels`. As operators they also
work on fake tensors and under ``torch.compile``, where values can't be read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from ..errors import CompatError, LevelSetError, TensorError
from ..kernels import ALPHA_MAX, ALPHA_MIN, reference
from ..levels import LevelSet
from ._checks import checked, one_value

QParams = tuple[Tensor, Tensor, Tensor, Tensor]
MAX_CODE = 2**20  # the largest code for which a dense table is made
_ROUNDING = 1e-6  # the original's levels are rounded otherwise than ours, in float32


def torch_set(b: int, k: int, signed: bool) -> LevelSet:
    """The original's level set; raises CompatError where b and k make none."""
    try:
        return LevelSet.apot(b, k, bool(signed), scheme="torch")
    except LevelSetError as error:
        raise CompatError(f"APoT with b={b!r}, k={k!r}: {error}") from None


def make_qparams(alpha: Tensor, level_set: LevelSet) -> QParams:
    """α, γ, the level of every code (ascending) and these codes.

    γ = α / (2 − 2^(1−n)) is the value of the largest power of two, 2^E · α/M.
    """
    step = kernels.step_of(alpha, level_set.unit)
    gamma = step * 2.0 ** (level_set.unit.bit_length() - 1)
    codes = sorted_codes(level_set)
    index = torch.tensor([level_set.code_indices[code] for code in codes], dtype=torch.int16)
    levels = kernels.dequantize(index.to(alpha.device), alpha, level_set)
    return alpha, gamma, levels, torch.tensor(codes, device=alpha.device)


@functools.lru_cache(maxsize=64)
def sorted_codes(level_set: LevelSet) -> tuple[int, ...]:
    """Every code by its level, ascending; of codes with one level the lowest is first."""
    return tuple(sorted(range(len(level_set.code_indices)), key=level_set.code_indices.__getitem__))


class Table(NamedTuple):
    """What the tensors mean: a level set, its α, and both directions between index and code."""

    level_set: LevelSet
    alpha: Tensor
    code_of_index: Tensor
    index_of_code: Tensor  # −1 where there is no such code


def read_table(alpha: Tensor | None, levels: Tensor, codes: Tensor, device: torch.device) -> Table:
    """Find the level set that levels and their codes mean; tables come on ``device``.

    Raises CompatError where there is none, TensorError for more than one α, a NaN, or codes that
    are no integers.
    """
    if levels.numel() != codes.numel() or not levels.numel():
        raise CompatError(
            f"{levels.numel()} quantization_levels and {codes.numel()} level_indices; every level "
            "has one code: pass both as calculate_qparams gave them"
        )
    checked(codes, "level_indices (after quantization_levels)", "integer")
    if alpha is not None and bool(one_value(alpha, "alpha").isnan().any()):
        raise TensorError("alpha is NaN; observe finite data, or load a state from before it was")
    wide = reference.working_dtype(levels)
    values = tuple(levels.flatten().to(wide).tolist())
    clip = None if alpha is None else float(alpha)
    level_set, *tables = _read(values, tuple(codes.flatten().tolist()), clip, wide)
    return Table(level_set, *(table.to(device) for table in tables))


@functools.lru_cache(maxsize=64)
def _read(
    values: tuple[float, ...], numbers: tuple[int, ...], alpha: float | None, dtype: torch.dtype
) -> Table:
    if min(numbers) < 0 or max(numbers) > MAX_CODE or len(set(numbers)) < len(numbers):
        raise CompatError(
            f"level_indices must be distinct codes of 0 … {MAX_CODE:,}; pass those of "
            "calculate_qparams"
        )
    levels, order = torch.tensor(values, dtype=dtype).sort(stable=True)
    codes = torch.tensor(numbers, dtype=torch.int64)[order]
    clip = None if alpha is None else torch.tensor(alpha, dtype=dtype)
    level_set, clip, index = _find(levels, clip)
    # of places with one float level the first stands for all, as in the original
    place = torch.searchsorted(index, torch.arange(len(level_set)))
    place = torch.searchsorted(levels, levels[place])
    index_of_code = torch.full((max(numbers) + 1,), -1, dtype=torch.int16)
    index_of_code[codes] = index.to(torch.int16)
    return Table(level_set, clip, codes[place].to(torch.int32), index_of_code)


def _find(levels: Tensor, alpha: Tensor | None) -> tuple[LevelSet, Tensor, Tensor]:
    """Level set, α and the index of every place of the ascending ``levels``."""
    top = levels.abs().max()
    if not ALPHA_MIN <= float(top) <= ALPHA_MAX:
        raise CompatError(
            f"quantization_levels reach {float(top):g}; finite levels are wanted, not all zero, "
            "the largest within [2^-40, 2^40]"
        )
    if alpha is not None and (known := _recognized(levels, alpha)):
        return known
    if exact := _as_integers(levels):
        return exact, top, levels.unique(return_inverse=True)[1]
    if known := _recognized(levels, top):
        return known
    raise CompatError(
        "quantization_levels: no level set has these levels: 0 must be among them, and all be "
        "multiples of one unit, at most 2^53 of it; APoTObserver.calculate_qparams gives such ones"
    )


def _recognized(levels: Tensor, alpha: Tensor) -> tuple[LevelSet, Tensor, Tensor] | None:
    """The APoT set that has these levels at this α, to within roundings of float32."""
    least = levels.abs()[levels != 0].min() * (1 + _ROUNDING)
    for level_set in _candidates(len(levels), bool(levels[0] < 0)):
        if not bool(least * level_set.unit >= alpha):  # α / M is the least level: spares the rest
            continue
        _, _, expected, codes = make_qparams(alpha, level_set)
        if torch.allclose(expected, levels, rtol=_ROUNDING, atol=0.0):
            return level_set, alpha, torch.tensor(level_set.code_indices)[codes]
    return None


@functools.lru_cache(maxsize=64)
def _candidates(count: int, signed: bool) -> tuple[LevelSet, ...]:
    """APoT sets of so many codes: 2^k choices per term, or 2^(k+1) − 1 where they have signs."""
    found = []
    for k in range(1, 6):
        choices, n = 2 ** (k + signed) - signed, 0
        while choices**n < count:
            n += 1
        if choices**n == count and n:
            try:
                found.append(torch_set(k * n, k, signed))
            except CompatError:
                continue
    return tuple(found)


def _as_integers(levels: Tensor) -> LevelSet | None:
    """The levels as integers over their exact common unit: floats are dyadic fractions."""
    values = [Fraction(value) for value in dict.fromkeys(levels.tolist())]
    unit = max(value.denominator for value in values)
    try:
        return LevelSet(int(value * unit) for value in values)
    except LevelSetError:
        return None


# Operators ---------------------------------------------------------------------------------------

_SCHEMA = "(Tensor {}, Tensor? alpha, Tensor levels, Tensor codes) -> Tensor"


@torch.library.custom_op("apot_fx_compat::quantize", mutates_args=(), schema=_SCHEMA.format("x"))
def quantize(x: Tensor, alpha: Tensor | None, levels: Tensor, codes: Tensor) -> Tensor:
    """The code of every value, int32, of x's shape and strides."""
    level_set, clip, code_of_index, _ = read_table(alpha, levels, codes, x.device)

    def code(part: Tensor) -> Tensor:
        index = kernels.quantize(part, clip, level_set)
        return reference.look_up(code_of_index, index.to(torch.int32), part)

    return _in_parts(code, x, torch.int32)


@torch.library.custom_op(
    "apot_fx_compat::dequantize", mutates_args=(), schema=_SCHEMA.format("code")
)
def dequantize(code: Tensor, alpha: Tensor | None, levels: Tensor, codes: Tensor) -> Tensor:
    """The level of every code, float32 (float64 where the levels are), of code's shape."""
    level_set, clip, _, index = read_table(alpha, levels, codes, code.device)
    _check_codes(code, index)
    value_of_code = kernels.dequantize(index.masked_fill(index < 0, 0), clip, level_set)

    def value(part: Tensor) -> Tensor:
        return reference.look_up(value_of_code, part.to(torch.int32), part)

    return _in_parts(value, code, value_of_code.dtype)


@torch.library.custom_op(
    "apot_fx_compat::quant_dequant", mutates_args=(), schema=_SCHEMA.format("x")
)
def quant_dequant(x: Tensor, alpha: Tensor | None, levels: Tensor, codes: Tensor) -> Tensor:
    """``dequantize(quantize(x))`` of x's dtype, without looking codes up and back."""
    level_set, clip, _, _ = read_table(alpha, levels, codes, x.device)

    def value(part: Tensor) -> Tensor:
        index = kernels.quantize(part, clip, level_set)
        return kernels.dequantize(index, clip, level_set).to(x.dtype)

    return _in_parts(value, x, x.dtype)


def _in_parts(function: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Tensor:
    """``function(x)``; of a large x some values at a time, that stay in the cache."""
    if not reference.in_parts(x):
        return function(x)
    out = torch.empty_like(x, dtype=dtype)
    for part, place in zip(reference.parts(x), reference.parts(out), strict=True):
        place.copy_(function(part))
    return out


def _check_codes(code: Tensor, index_of_code: Tensor) -> None:
    """Refuse codes of which the level is not known."""
    if code.is_floating_point() or code.is_complex() or code.dtype == torch.bool:
        raise TensorError(f"dequantize: codes are {code.dtype}; an integer tensor is wanted")
    if not code.numel():
        return
    low, high = (int(end) for end in code.aminmax())
    known = low >= 0 and high < len(index_of_code)
    if known and bool((index_of_code < 0).any()):  # not every number is a code
        known = bool((index_of_code[code.long()] >= 0).all())
    if not known:
        raise TensorError(
            f"dequantize: codes from {low} to {high} are not all among level_indices, of 0 … "
            f"{len(index_of_code) - 1}; dequantize what the same quantizer gave"
        )


@quantize.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, dtype=torch.int32)


@dequantize.register_fake
def _(code: Tensor, alpha: Tensor | None, levels: Tensor, codes: Tensor) -> Tensor:
    return torch.empty_like(code, dtype=reference.working_dtype(levels))


@quant_dequant.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)
