"""Level sets: the sorted distinct integers that a quantized value can take, 0 among them.

Pure integer maths, standard library only. A level set is described by its *terms*: lists of
integer choices, one of which is taken from each, and added up. Which choices were taken is the
*code*, the position in the Cartesian product of the terms, first term most significant; a sign
comes before all terms. The power-of-two families, FP4 and user-given integers differ in nothing
but their terms.

Source: Li, Dong, Wang, *Additive Powers-of-Two Quantization*, ICLR 2020, section 2.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

from .errors import LevelSetError, did_you_mean

Terms = tuple[tuple[int, ...], ...]

MAX_UNIT = 2**53  # float64 holds every integer up to here
MAX_LEVELS = 2**15  # int16 holds every index up to here
SCHEMES = ("paper", "torch")

# Largest legal bits by scheme, signed and k, where the unit is at most MAX_UNIT and the levels
# are at most MAX_LEVELS. A table, because the distinct sums of the signed torch scheme have no
# short formula and enumerating them would make a slip like bits=10**6 hang; a test recounts it.
# k above 5 is in no row: the smallest unit is then 2^(2^6 - 2).
_LARGEST_BITS = {
    ("paper", False): {1: 15, 2: 15, 3: 15, 4: 12, 5: 5},
    ("paper", True): {1: 15, 2: 15, 3: 13, 4: 13, 5: 6},
    ("torch", False): {1: 15, 2: 14, 3: 15, 4: 12, 5: 5},
    ("torch", True): {1: 14, 2: 10, 3: 9, 4: 12, 5: 5},
}
_FP4_MAGNITUDES = (0, 1, 2, 3, 4, 6, 8, 12)  # E2M1 doubled, in the order of its codes


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class LevelSet:
    """Sorted distinct integer levels, 0 among them. Frozen; equal and hashed by :attr:`spec`.

    ``LevelSet(integers)`` takes any integers; :meth:`apot`, :meth:`uniform`, :meth:`pot` and
    :meth:`fp4` are the known families, :meth:`parse` reads a spec back. A level q stands for the
    real number q · α / unit; alpha (α) belongs to a tensor, not to its level set.

    Args:
        integers: the levels, in any order, each once: 0 and at least one other, at most 32,768,
            none beyond ±2^53.

    Raises LevelSetError for integers that make no level set.

    >>> s = LevelSet([-2, -1, 0, 1, 2])
    >>> s.levels, s.unit, len(s), s.bits
    ((-2, -1, 0, 1, 2), 2, 5, 3)
    >>> s.spec
    'levels(-2,-1,0,1,2)'
    >>> LevelSet.parse(s.spec) == s
    True
    """

    spec: str
    _signs: tuple[int, ...] = dataclasses.field(compare=False)
    _terms: Terms = dataclasses.field(compare=False)

    def __init__(self, integers: Iterable[int]) -> None:
        levels = _check_levels(integers)
        self._fill(f"levels({','.join(map(str, levels))})", (1,), (levels,))

    @classmethod
    def _of(cls, spec: str, signs: tuple[int, ...], terms: Terms) -> LevelSet:
        level_set = cls.__new__(cls)
        level_set._fill(spec, signs, terms)
        return level_set

    def _fill(self, spec: str, signs: tuple[int, ...], terms: Terms) -> None:
        # the one place that writes to the frozen fields
        for name, value in (("spec", spec), ("_signs", signs), ("_terms", terms)):
            object.__setattr__(self, name, value)

    @classmethod
    def apot(
        cls, bits: int = 4, k: int = 2, signed: bool = True, scheme: str = "paper"
    ) -> LevelSet:
        """Additive powers of two: every magnitude is a sum of terms, each 0 or a power of two.

        With m magnitude bits there are n = m / k terms of k bits, and term i takes
        {0} ∪ {2^−(i + j·n) : j = 0 … 2^k − 2}. For k = 2 and odd m = 2n + 1, term i takes
        {0, 2^−i, 2^−(i+n), 2^−(i+2n+1)} and one more term {0, 2^−2n}. (Li, Dong, Wang,
        *Additive Powers-of-Two Quantization*, ICLR 2020, section 2.) Levels are these sums over
        their common denominator.

        Args:
            bits: all bits of a value, the sign's included.
            k: bits per term. It divides m, or is 2; 1 is uniform, m power-of-two.
            signed: whether there are negative levels.
            scheme: "paper": a sign bit and m = bits − 1, or unsigned with m = bits. "torch", as
                in PyTorch's experimental APoT: m = bits, k divides it, and signed takes ± in
                every term, so that two codes can mean one level.

        Raises LevelSetError, naming legal choices.

        >>> LevelSet.apot(bits=4, signed=False).levels
        (0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48)
        >>> s = LevelSet.apot(bits=4, signed=True, scheme="torch")
        >>> len(s), len(s.code_indices), s.unit
        (39, 49, 48)
        """
        if scheme not in SCHEMES:
            hint = did_you_mean(str(scheme), SCHEMES)
            raise LevelSetError(f"scheme must be 'paper' or 'torch', not {scheme!r}.{hint}")
        bits, k = _check_count("bits", bits), _check_count("k", k)
        _check_split(bits, k, _check_signed(signed), scheme)
        return _apot(bits, k, signed, scheme)

    @classmethod
    def uniform(cls, bits: int = 8, signed: bool = True) -> LevelSet:
        """Evenly spaced levels: ±(2^(bits−1) − 1) where signed, else 0 … 2^bits − 1.

        It is APoT with k = 1; codes are sign and magnitude, not two's complement.

        >>> LevelSet.uniform(3, signed=True).levels
        (-3, -2, -1, 0, 1, 2, 3)
        """
        bits = _check_count("bits", bits)
        largest = _LARGEST_BITS["paper", _check_signed(signed)][1]
        _check_bits(f"uniform(bits={bits},signed={signed})", bits, signed, largest)
        return _family("uniform", bits, 1, signed)

    @classmethod
    def pot(cls, bits: int = 4, signed: bool = True) -> LevelSet:
        """Powers of two and 0: one term of all magnitude bits, APoT with k = m.

        >>> LevelSet.pot(3, signed=False).levels
        (0, 1, 2, 4, 8, 16, 32, 64)
        """
        bits = _check_count("bits", bits)
        largest = max(_LARGEST_BITS["paper", _check_signed(signed)]) + signed  # k = m
        _check_bits(f"pot(bits={bits},signed={signed})", bits, signed, largest)
        return _family("pot", bits, bits - signed, signed)

    @classmethod
    def fp4(cls) -> LevelSet:
        """FP4 (E2M1) doubled, always signed; with group size 32 this is MXFP4.

        Codes are E2M1's own: sign, two exponent bits, one mantissa bit.

        >>> LevelSet.fp4().levels
        (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)
        """
        return _fp4()

    @staticmethod
    def parse(spec: str) -> LevelSet:
        """Read a level set back from its :attr:`spec`; fields left out take their defaults.

        Cached: parsing an equal spec again gives the same object, tables and all.

        >>> LevelSet.parse("apot(bits=4,k=2,signed=True,scheme=paper)")
        LevelSet.apot(bits=4, k=2, signed=True)
        """
        if not isinstance(spec, str):
            raise LevelSetError(f"a spec is a string such as {_EXAMPLE!r}, not {spec!r}")
        return _parse(spec)

    @functools.cached_property
    def levels(self) -> tuple[int, ...]:
        """The levels, ascending; the position of a level is its index."""
        sums = {0}
        for term in self._terms:  # sets, so that equal sums don't multiply on the way
            sums = {partial + choice for partial in sums for choice in term}
        return tuple(sorted({sign * total for sign in self._signs for total in sums}))

    @functools.cached_property
    def code_indices(self) -> tuple[int, ...]:
        """The index of every code; the position is the code. Two codes can share an index.

        >>> LevelSet.apot(bits=3).code_indices  # sign, then two bits: 0, 2^0, 2^-1, 2^-2
        (3, 6, 5, 4, 3, 0, 1, 2)
        """
        sums = [0]
        for term in self._terms:
            sums = [partial + choice for partial in sums for choice in term]
        index = {level: position for position, level in enumerate(self.levels)}
        return tuple(index[sign * total] for sign in self._signs for total in sums)

    @functools.cached_property
    def codes(self) -> tuple[int, ...]:
        """The code of every index, the lowest where several codes mean one level.

        Levels sorted stably by value give that code too. PyTorch's own sort is not stable, and
        which of several codes it puts first is an accident of its implementation.

        >>> LevelSet.apot(bits=4, signed=False, scheme="torch").codes
        (0, 3, 12, 15, 2, 14, 8, 11, 10, 1, 13, 9, 4, 7, 6, 5)
        """
        first: dict[int, int] = {}
        for code, index in enumerate(self.code_indices):
            first.setdefault(index, code)
        return tuple(first[index] for index in range(len(self)))

    @functools.cached_property
    def thresholds(self) -> tuple[int, ...]:
        """Where neighbouring levels meet, in half-units: q_i + q_(i+1), one fewer than levels."""
        return tuple(map(operator.add, self.levels, self.levels[1:]))

    @functools.cached_property
    def unit(self) -> int:
        """M, the largest magnitude: the level that stands for α."""
        return max(-self.q_min, self.q_max)

    @property
    def q_min(self) -> int:
        """The lowest level."""
        return self.levels[0]

    @property
    def q_max(self) -> int:
        """The highest level."""
        return self.levels[-1]

    @functools.cached_property
    def zero_index(self) -> int:
        """The index of level 0."""
        return self.levels.index(0)

    @property
    def signed(self) -> bool:
        """Whether there are negative levels."""
        return self.q_min < 0

    @property
    def bits(self) -> int:
        """Stored bits of an index, ceil(log2 of the number of levels)."""
        return (len(self) - 1).bit_length()

    @property
    def index_dtype(self) -> str:
        """Name of the dtype that holds an index: "uint8" up to 256 levels, else "int16"."""
        return "uint8" if len(self) <= 256 else "int16"

    def terms(self, index: int) -> tuple[tuple[int, int], ...]:
        """Write a level as a sum of sign · 2^shift, in the order of its code's terms.

        What a shift-and-add engine computes: for APoT at most one pair per term; a choice that is
        no power of two (FP4, user-given levels) gives one pair per binary digit, highest first.

        Args:
            index: 0 … len − 1.

        Returns the (sign, shift) pairs, sign 1 or −1; none for level 0.

        >>> s = LevelSet.apot(bits=4)
        >>> s.levels[0], s.terms(0)
        (-10, ((-1, 3), (-1, 1)))
        """
        if not 0 <= index < len(self):
            raise LevelSetError(f"{self!r} has indices 0 … {len(self) - 1}, not {index}")
        code, choices = self.codes[index], list[int]()
        for term in reversed(self._terms):
            code, position = divmod(code, len(term))
            choices.append(term[position])
        sign = self._signs[code]  # what is left of the code
        return tuple(pair for choice in choices[::-1] for pair in _binary_digits(sign * choice))

    def exponents(self, index: int) -> tuple[int, ...]:
        """Give the exponents e of a level written as a sum of ±2^−e, as the paper writes it.

        One e per pair of :meth:`terms`, which has the signs: e = E − shift, where 2^E is the
        largest power of two up to the unit. For APoT this is the 2^−(i + j·n) of term i.

        >>> s = LevelSet.apot(bits=4)
        >>> s.levels[-1], s.exponents(len(s) - 1)  # 2^0 + 2^-2
        (10, (0, 2))
        """
        top = self.unit.bit_length() - 1
        return tuple(top - shift for _, shift in self.terms(index))

    def __len__(self) -> int:
        return len(self.levels)

    def __repr__(self) -> str:
        family, _, fields = self.spec.rstrip(")").partition("(")
        if family == "levels":
            shown = fields.split(",")
            if len(shown) > 16:
                shown[4:-4] = ["..."]
            return f"LevelSet([{', '.join(shown)}])"
        fields = fields.replace(",scheme=paper", "").replace("scheme=torch", "scheme='torch'")
        return f"LevelSet.{family}({', '.join(filter(None, fields.split(',')))})"

    def __reduce__(self) -> tuple[Any, ...]:
        # copies and pickles carry the spec, not the tables
        return LevelSet.parse, (self.spec,)


_EXAMPLE = "apot(bits=4,k=2,signed=True,scheme=paper)"
_FAMILIES: dict[str, Callable[..., LevelSet]] = {
    "apot": LevelSet.apot,
    "uniform": LevelSet.uniform,
    "pot": LevelSet.pot,
    "fp4": LevelSet.fp4,
    "levels": lambda *integers: LevelSet(integers),
}


# Building terms --------------------------------------------------------------------------------


def _exponents(m: int, k: int) -> list[list[int]]:
    """Give for each term its exponents e: it takes 0 or 2^-e, in the order of its codes."""
    n = m // k
    if m % k == 0:
        return [[i + j * n for j in range(2**k - 1)] for i in range(n)]
    # k = 2 and m odd: the last term has one bit, and its 2^-2n stands between the others' powers
    return [[i, i + n, i + 2 * n + 1] for i in range(n)] + [[2 * n]]


def _build_terms(m: int, k: int, both_signs: bool = False) -> Terms:
    """Scale the terms to integers: the smallest power of two becomes 1."""
    exponents = _exponents(m, k)
    top = max(map(max, exponents))
    terms = [[0, *(1 << (top - e) for e in term)] for term in exponents]
    if both_signs:  # PyTorch sorts such terms, highest first; its codes follow that order
        terms = [sorted({s * c for c in term for s in (1, -1)}, reverse=True) for term in terms]
    return tuple(map(tuple, terms))


@functools.cache
def _apot(bits: int, k: int, signed: bool, scheme: str) -> LevelSet:
    spec = f"apot(bits={bits},k={k},signed={signed},scheme={scheme})"
    if scheme == "torch":
        return LevelSet._of(spec, (1,), _build_terms(bits, k, both_signs=signed))
    return LevelSet._of(spec, (1, -1)[: 1 + signed], _build_terms(bits - signed, k))


@functools.cache
def _family(name: str, bits: int, k: int, signed: bool) -> LevelSet:
    spec = f"{name}(bits={bits},signed={signed})"
    return LevelSet._of(spec, (1, -1)[: 1 + signed], _build_terms(bits - signed, k))


@functools.cache
def _fp4() -> LevelSet:
    return LevelSet._of("fp4()", (1, -1), (_FP4_MAGNITUDES,))


def _binary_digits(choice: int) -> list[tuple[int, int]]:
    """Write an integer as (sign, shift) pairs, one per binary digit 1, highest shift first."""
    sign, magnitude = (-1, -choice) if choice < 0 else (1, choice)
    return [(sign, s) for s in reversed(range(magnitude.bit_length())) if magnitude >> s & 1]


# Checks ----------------------------------------------------------------------------------------


def _as_integer(value: object) -> int | None:
    """Take an int, also NumPy's or torch's; None for all else, and for bools of any kind."""
    if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _check_count(name: str, value: object) -> int:
    count = _as_integer(value)
    if count is None or count < 1:
        raise LevelSetError(f"{name} must be an integer of 1 or more, not {value!r}")
    return count


def _check_signed(signed: object) -> bool:
    if not isinstance(signed, bool):
        raise LevelSetError(f"signed must be True or False, not {signed!r}")
    return signed


def _check_bits(what: str, bits: int, signed: bool, largest: int) -> None:
    """Refuse bits beyond the largest legal ones, and a sign bit without magnitude bits."""
    if bits > largest:
        raise LevelSetError(
            f"{what}: more than {MAX_LEVELS:,} levels or a unit above 2^53; the largest legal "
            f"bits here is {largest}"
        )
    if bits == signed:
        raise LevelSetError(
            f"{what}: the one bit is the sign's and none is left for the magnitude; use bits=2 "
            "or more, or signed=False"
        )


def _check_split(bits: int, k: int, signed: bool, scheme: str) -> None:
    """Refuse what can't be split into terms of k bits, or is too large, without enumerating."""
    what = f"apot(bits={bits},k={k},signed={signed},scheme={scheme})"
    largest = _LARGEST_BITS[scheme, signed]
    sign_bits = int(signed and scheme == "paper")
    if k in largest or bits <= sign_bits:
        _check_bits(what, bits, bool(sign_bits), largest.get(k, bits))
    m = bits - sign_bits
    legal = [
        other
        for other, most in largest.items()
        if bits <= most and (m % other == 0 or (other == 2 and scheme == "paper"))
    ]
    if k in legal:
        return
    left_out = ", the sign's left out," if sign_bits else ""
    reason = f"{m} magnitude bits{left_out} can't be split into terms of {k}"
    if k not in largest:
        reason = f"no bits are legal with k={k}, whose terms put the unit above 2^53"
    remedy = f"legal k for bits={bits}: {', '.join(map(str, legal))}"
    if not legal:
        remedy = f"k is at most {max(largest)}, and bits at most {max(largest.values())}"
    raise LevelSetError(f"{what}: {reason}; {remedy}")


def _check_levels(integers: Iterable[int]) -> tuple[int, ...]:
    """User-given levels, sorted; refuse what makes no level set."""
    if not isinstance(integers, Iterable):
        raise LevelSetError(f"levels must be integers such as [-1, 0, 1], not {integers!r}")
    levels: list[int] = []
    for given in itertools.islice(integers, MAX_LEVELS + 1):  # an endless iterable ends too
        level = _as_integer(given)
        if level is None:
            raise LevelSetError(f"levels must be integers, and {given!r} is none")
        levels.append(level)
    if len(levels) > MAX_LEVELS:
        raise LevelSetError(f"more than {MAX_LEVELS:,} levels; give fewer")
    levels.sort()
    twice = [low for low, high in itertools.pairwise(levels) if low == high]
    if twice:
        raise LevelSetError(f"levels must be distinct; {twice[0]} is given more than once")
    if 0 not in levels or len(levels) < 2:
        raise LevelSetError("levels must be distinct, with 0 and at least one other among them")
    if max(-levels[0], levels[-1]) > MAX_UNIT:
        raise LevelSetError("levels must lie within ±2^53; divide them by a common factor")
    return tuple(levels)


@functools.lru_cache(maxsize=1024)
def _parse(spec: str) -> LevelSet:
    match = re.fullmatch(r"(\w+)\((.*)\)", spec)
    if match is None or match[1] not in _FAMILIES:
        hint = did_you_mean(spec.partition("(")[0], _FAMILIES)
        raise LevelSetError(f"{spec!r} is no spec such as {_EXAMPLE!r}.{hint}")
    fields = match[2].replace(" ", "").split(",") if match[2] else []
    try:
        if match[1] == "levels":
            return LevelSet(map(int, fields))
        options = dict(field.split("=") for field in fields)
        if len(options) < len(fields):
            raise ValueError("a field is given twice")
        return _FAMILIES[match[1]](**{key: _value(text) for key, text in options.items()})
    except (ValueError, TypeError) as problem:
        if isinstance(problem, LevelSetError):
            raise
        raise LevelSetError(f"{spec!r} is no spec such as {_EXAMPLE!r}: {problem}") from None


def _value(text: str) -> bool | int | str:
    if text in ("True", "False"):
        return text == "True"
    return int(text) if text.isdecimal() else text
