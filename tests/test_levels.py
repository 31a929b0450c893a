"""Level sets against sums of fractions made from the paper's text."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apot_fx import LevelSet
from apot_fx.errors import LevelSetError

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
