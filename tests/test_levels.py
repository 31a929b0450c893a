"""Level sets against sums of fractions made from the paper's text."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apot_fx import LevelSet
from apot_fx.errors import LevelSetError
from apot_fx.levels import _LARGEST_BITS

UNITS = {1: 1, 2: 4, 3: 10, 4: 48, 5: 100, 6: 448, 7: 904, 8: 3840}


def paper_terms(m: int, k: int) -> list[list[Fraction]]:
    """The choices of every term, as section 2 of the paper lists them."""

    def power(exponent: int) -> Fraction:
        return Fraction(1, 2**exponent)

    if k == 2 and m % 2 == 1:
        n = (m - 1) // 2
        terms = [[Fraction(0), power(i), power(i + n), power(i + 2 * n + 1)] for i in range(n)]
        return [*terms, [Fraction(0), power(2 * n)]]
    n = m // k
    return [[Fraction(0), *(power(i + j * n) for j in range(2**k - 1))] for i in range(n)]


def legal() -> list[tuple[int, int]]:
    pairs = [(m, k) for m in range(1, 9) for k in range(1, m + 1) if m % k == 0]
    pairs += [(m, 2) for m in (1, 3, 5, 7)]
    return [(m, k) for m, k in pairs if k <= 5]  # k = m above 5: unit beyond 2^53


@pytest.mark.parametrize(("m", "k"), legal())
def test_levels_codes_and_units(m: int, k: int) -> None:
    sums = [sum(choice) for choice in itertools.product(*paper_terms(m, k))]
    scale = max(value.denominator for value in sums)
    integers = [int(value * scale) for value in sums]
    unsigned = LevelSet.apot(m, k, signed=False)
    assert list(unsigned.levels) == sorted(integers)
    assert unsigned.unit == max(integers) and (k != 2 or unsigned.unit == UNITS[m])
    assert [unsigned.levels[i] for i in unsigned.code_indices] == integers
    signed = LevelSet.apot(m + 1, k, signed=True)
    assert set(signed.levels) == set(integers) | {-v for v in integers}
    assert len(signed) == 2 ** (m + 1) - 1
    assert [signed.levels[i] for i in signed.code_indices] == integers + [-v for v in integers]
    for levels in (unsigned, signed):
        for index, level in enumerate(levels.levels):
            assert levels.code_indices[levels.codes[index]] == index
            assert sum(sign * 2**shift for sign, shift in levels.terms(index)) == level


def test_the_tables_of_the_design() -> None:
    assert LevelSet.apot(2, signed=False).levels == (0, 1, 2, 4)
    assert LevelSet.apot(3, signed=False).levels == (0, 1, 2, 3, 4, 6, 8, 10)
    assert LevelSet.apot(4, signed=False).levels == (
        0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48,
    )  # fmt: skip
    assert LevelSet.uniform(8, signed=True).levels == tuple(range(-127, 128))
    assert LevelSet.uniform(8, signed=False).levels == tuple(range(256))
    assert LevelSet.fp4().unit == 12 and len(LevelSet.fp4()) == 15


def test_torch_scheme() -> None:
    signed = LevelSet.apot(4, 2, signed=True, scheme="torch")
    assert (len(signed), len(signed.code_indices)) == (39, 49)
    unsigned = LevelSet.apot(4, 2, signed=False, scheme="torch")
    assert unsigned.codes == (0, 3, 12, 15, 2, 14, 8, 11, 10, 1, 13, 9, 4, 7, 6, 5)


ANY = st.one_of(
    st.builds(LevelSet.apot, st.integers(2, 9), st.just(2), st.booleans()),
    st.builds(LevelSet.uniform, st.integers(2, 10), st.booleans()),
    st.builds(LevelSet.pot, st.integers(2, 5), st.booleans()),
    st.builds(lambda v: LevelSet({*v, 0, 1}), st.sets(st.integers(-(2**53), 2**53), max_size=20)),
)


@given(ANY)
def test_spec_is_identity(levels: LevelSet) -> None:
    other = LevelSet.parse(levels.spec)
    assert other == levels and hash(other) == hash(levels) and other.levels == levels.levels
    assert levels.levels[levels.zero_index] == 0
    assert levels.bits == max(1, (len(levels) - 1).bit_length())
    assert levels.index_dtype == ("uint8" if len(levels) <= 256 else "int16")
    assert list(levels.thresholds) == [a + b for a, b in itertools.pairwise(levels.levels)]


@pytest.mark.parametrize(("build", "text"), [
    (lambda: LevelSet.apot(6, 3), "legal k for bits=6: 1, 2, 5"),
    (lambda: LevelSet.apot(10**6, 2), "largest legal bits"),
    (lambda: LevelSet.apot(3, 10**6), "legal k"),
    (lambda: LevelSet.apot(0), "bits must be"),
    (lambda: LevelSet.apot(4.5), "bits must be"),
    (lambda: LevelSet.apot(True), "bits must be"),
    (lambda: LevelSet.apot(4, 2, "yes"), "signed must be"),
    (lambda: LevelSet.apot(4, 2, True, "papr"), "Did you mean 'paper'"),
    (lambda: LevelSet.apot(1, 1, True), "none is left"),
    (lambda: LevelSet.pot(9, True), "largest legal bits"),
    (lambda: LevelSet.uniform(16, True), "largest legal bits"),
    (lambda: LevelSet([1, 2]), "with 0"),
    (lambda: LevelSet([0]), "at least one other"),
    (lambda: LevelSet([0, 1, 1]), "distinct"),
    (lambda: LevelSet([0, 0.5]), "integers"),
    (lambda: LevelSet([0, 2**53 + 1]), "2^53"),
    (lambda: LevelSet(range(2**15 + 1)), "32,768"),
    (lambda: LevelSet([True, 0]), "True is none"),
    (lambda: LevelSet([0, 1, 1]), "1 is given more than once"),
    (lambda: LevelSet([]), "with 0"),
    (lambda: LevelSet(5), "not 5"),
    (lambda: LevelSet.apot(1, 7, True), "none is left"),
    (lambda: LevelSet.apot(7, 6), "legal k for bits=7: 1, 2, 3"),
    (lambda: LevelSet.apot(10**6, 6), "no bits are legal with k=6"),
    (lambda: LevelSet.apot(12, 3, True, "torch"), "largest legal bits here is 9"),
    (lambda: LevelSet.apot(5, 2, True, "torch"), "legal k for bits=5: 1, 5"),
    (lambda: LevelSet.parse("apot(bits=3,bits=4)"), "given twice"),
    (lambda: LevelSet.parse("levels(0,,1)"), "no spec"),
    (lambda: LevelSet.parse("fp4(a=1)"), "no spec"),
    (lambda: LevelSet.parse(3), "a spec is a string"),
    (lambda: LevelSet.parse("apt(bits=3)"), "Did you mean 'apot'"),
    (lambda: LevelSet.parse("apot(bitz=3)"), "no spec"),
])  # fmt: skip
def test_refusals(build: object, text: str) -> None:
    with pytest.raises(LevelSetError) as caught:
        build()  # type: ignore[operator]
    assert text in str(caught.value)


def test_the_largest_bits_are_the_largest() -> None:
    for k, signed, most in ((2, True, 15), (2, False, 15), (3, False, 15), (5, False, 5)):
        levels = LevelSet.apot(most, k, signed)
        assert levels.unit <= 2**53 and len(levels) <= 2**15
        with pytest.raises(LevelSetError):
            LevelSet.apot(most + k, k, signed)


def torch_terms(bits: int, k: int, signed: bool) -> list[list[Fraction]]:
    """The choices of every term in the order of PyTorch's experimental observer."""
    n = bits // k
    terms = [[Fraction(1, 2 ** (i + j * n)) for j in range(2**k - 1)] for i in range(n)]
    if not signed:
        return [[Fraction(0), *term] for term in terms]
    return [sorted([Fraction(0), *term, *(-v for v in term)], reverse=True) for term in terms]


TORCH = [
    (bits, k, signed)
    for k in range(1, 6)
    for bits in range(k, 9, k)
    for signed in (False, True)
    if (2 ** (k + 1) - 1) ** (bits // k) < 10_000
]


@pytest.mark.parametrize(("bits", "k", "signed"), TORCH)
def test_torch_scheme_codes_are_positions_in_the_product(bits: int, k: int, signed: bool) -> None:
    sums = [sum(row) for row in itertools.product(*torch_terms(bits, k, signed))]
    scale = max(value.denominator for value in sums)
    integers = [int(value * scale) for value in sums]
    levels = LevelSet.apot(bits, k, signed, "torch")
    assert levels.levels == tuple(sorted(set(integers)))
    assert [levels.levels[i] for i in levels.code_indices] == integers
    assert levels.codes == tuple(integers.index(level) for level in levels.levels)
    assert len(levels.code_indices) == (2 ** (k + 1) - 1 if signed else 2**k) ** (bits // k)
    for index, level in enumerate(levels.levels):
        assert sum(sign * 2**shift for sign, shift in levels.terms(index)) == level


@pytest.mark.parametrize(("scheme", "signed"), sorted(_LARGEST_BITS))
def test_every_entry_of_the_table_of_largest_bits(scheme: str, signed: bool) -> None:
    """Count distinct sums with the limits out of the way: the entry fits, the next does not."""
    row = _LARGEST_BITS[scheme, signed]
    assert sorted(row) == [1, 2, 3, 4, 5]
    for k, most in row.items():
        sign_bit = int(signed and scheme == "paper")

        def fits(m: int, k: int = k, sign_bit: int = sign_bit) -> bool:
            terms = paper_terms(m, k) if scheme == "paper" else torch_terms(m, k, signed)
            top = max(v.denominator for term in terms for v in term)
            if sum(max(term) for term in terms) * top > 2**53:
                return False
            sums = {0}
            for term in terms:
                sums = {a + int(v * top) for a in sums for v in term}
                if len(sums) > 2**15:
                    return False
            return len(sums) * (1 + sign_bit) - sign_bit <= 2**15

        odd = k == 2 and scheme == "paper"
        assert fits(most - sign_bit) and not fits(most - sign_bit + (1 if odd else k))
    # k = 6: one term already reaches 2^(2^6 - 2)
    assert 2 ** (2**6 - 2) > 2**53


def test_exponents_are_the_papers() -> None:
    levels = LevelSet.apot(4, 2, signed=True)
    assert levels.terms(levels.zero_index) == levels.exponents(levels.zero_index) == ()
    for index, level in enumerate(levels.levels):
        total = sum(Fraction(1, 2**e) for e in levels.exponents(index))
        assert total * 8 == abs(level)
    fp4 = LevelSet.fp4()
    assert fp4.terms(len(fp4) - 1) == ((1, 3), (1, 2)) and fp4.exponents(len(fp4) - 1) == (0, 1)
    with pytest.raises(LevelSetError, match="indices 0 … 14"):
        levels.terms(15)


@pytest.mark.parametrize("levels", [
    LevelSet.apot(), LevelSet.uniform(), LevelSet.pot(), LevelSet.fp4(), LevelSet([0, 1]),
    LevelSet.apot(4, 2, True, "torch"), LevelSet([0, -3]),
])  # fmt: skip
def test_frozen_copied_and_shown(levels: LevelSet) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        levels.spec = "fp4()"  # type: ignore[misc]
    for copied in (pickle.loads(pickle.dumps(levels)), copy.deepcopy(levels)):
        assert copied == levels and copied.levels == levels.levels
    assert eval(repr(levels)) == levels
    assert LevelSet.parse(levels.spec) is LevelSet.parse(levels.spec)
    assert levels.signed == (levels.levels[0] < 0)
    assert levels.unit == max(map(abs, levels.levels))


def test_integers_of_other_libraries_and_spaces_in_a_spec() -> None:
    import torch

    assert LevelSet(torch.tensor([1, 0, -1])) == LevelSet([-1, 0, 1])
    assert LevelSet.parse("apot(bits=3, k=2)") == LevelSet.apot(3)


def test_refusals_are_quick() -> None:
    start = time.perf_counter()
    for refused in (
        lambda: LevelSet.apot(10**6, 1),
        lambda: LevelSet.apot(10**6, 10**6, signed=False),
        lambda: LevelSet(itertools.count()),
    ):
        with pytest.raises(LevelSetError):
            refused()
    assert time.perf_counter() - start < 1
