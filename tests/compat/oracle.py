"""The original's levels, codes and nearest levels, on rationals; no code of apot_fx is in it."""

from __future__ import annotations

import bisect
import functools
import itertools
from fractions import Fraction

import torch


def sums(b: int, k: int, signed: bool) -> list[Fraction]:
    """The sum that every code means, in units of γ; the position is the code."""
    n = b // k
    terms = []
    for i in range(n):
        powers = [Fraction(1, 2 ** (i + j * n)) for j in range(2**k - 1)]
        both = sorted({0, *powers, *(-p for p in powers)}, reverse=True)
        terms.append(both if signed else [Fraction(0), *powers])
    return [sum(choice, Fraction(0)) for choice in itertools.product(*terms)]


def largest_sum(b: int, k: int) -> Fraction:
    """α / γ: every term's largest power of two, n of them."""
    return sum((Fraction(1, 2**i) for i in range(b // k)), Fraction(0))


@functools.cache
def first_codes(b: int, k: int, signed: bool) -> tuple[tuple[Fraction, ...], dict[Fraction, int]]:
    """Distinct levels ascending, and the lowest code of each."""
    first: dict[Fraction, int] = {}
    for code, value in enumerate(sums(b, k, signed)):
        first.setdefault(value, code)
    return tuple(sorted(first)), first


def acceptable_codes(x: float, alpha: float, b: int, k: int, signed: bool) -> set[int]:
    """The code of the nearest level, of equal levels the lowest code; near a threshold that of
    either neighbour: x · M/α is rounded, so that a tie on rationals may be none."""
    levels, first = first_codes(b, k, signed)
    scale = Fraction(alpha) / largest_sum(b, k)
    place = Fraction(min(max(x, -2 * alpha), 2 * alpha)) / scale
    middle = bisect.bisect_left(levels, place)
    near = levels[max(0, middle - 1) : middle + 1]
    distances = [abs(level - place) for level in near]
    if len(near) == 2 and abs(distances[0] - distances[1]) <= abs(place) / 2**20:
        return {first[level] for level in near}
    return {first[near[distances.index(min(distances))]]}


def level_tensor(b: int, k: int, signed: bool, alpha: float) -> torch.Tensor:
    """Levels ascending, rounded once to float32."""
    scale = Fraction(alpha) / largest_sum(b, k)
    return torch.tensor([float(value * scale) for value in sorted(sums(b, k, signed))])
