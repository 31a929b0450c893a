"""AdaRound's maths, and the neighbours of weights against an oracle of exact rationals."""

from __future__ import annotations

import bisect
import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import apot_fx
from apot_fx import LevelSet, WeightSpec
from apot_fx.fake_quant import FakeQuantize
from apot_fx.ptq.rounding import annealed_beta, initial_logits, rectified_sigmoid, regularizer
from apot_fx.ptq.soft import SoftWeight, neighbours

SPECS = [
    WeightSpec(2), WeightSpec(3), WeightSpec(4), WeightSpec(8), WeightSpec(3, kind="uniform"),
    WeightSpec(8, kind="uniform"), WeightSpec(4, kind="pot"), WeightSpec(kind="fp4"),
    WeightSpec(kind="levels", levels=(-7, -1, 0, 2)), WeightSpec(4, scheme="torch"),
]  # fmt: skip
GRAINS = ["tensor", "channel", "group"]


def quantizer(rows: torch.Tensor, spec: WeightSpec, grain: str) -> FakeQuantize:
    size = 3 if grain == "group" else None
    fields = {**spec.__dict__, "granularity": grain, "group_size": size}
    return FakeQuantize.for_weight(rows, WeightSpec(**fields), "weight")


def step_of(quant: FakeQuantize, row: int, place: int) -> float:
    alpha = quant.alpha.detach()
    if alpha.dim() == 1:
        alpha = alpha[row]
    elif alpha.dim() == 2:
        alpha = alpha[row, place // 3]
    return float(torch.div(alpha, torch.tensor(float(quant.unit))))


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.describe())
def test_neighbours_are_those_of_the_oracle(spec: WeightSpec, grain: str) -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 2, 5)
    quant = quantizer(rows, spec, grain)
    rows[0, 0, 0], rows[1, 1, 1], rows[2, 0, 3] = 0.0, 50.0, -50.0  # on a level, beyond the ends
    index, free = neighbours(rows, quant)
    levels = quant.known_level_set().levels
    for row, place in ((r, p) for r in range(4) for p in range(10)):
        weight = Fraction(float(rows[row].flatten()[place]))
        step = torch.tensor(step_of(quant, row, place))
        grid = [Fraction(float(q * step)) for q in levels]  # fl(q · step)
        below = bisect.bisect_right(grid, weight) - 1
        inside = 0 <= below < len(grid) - 1 and grid[below] != weight
        found = int(index[row].flatten()[place])
        assert bool(free[row].flatten()[place]) == inside
        assert found == min(max(below, 0), len(grid) - 1)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.describe())
def test_a_soft_weight_starts_as_the_float_weight(spec: WeightSpec) -> None:
    rows = torch.randn(6, 7)
    quant = quantizer(rows, spec, "channel")
    soft = SoftWeight(rows, quant)
    start = soft(rows).detach()
    torch.testing.assert_close(start[soft.free], rows[soft.free])
    nearest = quant(rows).detach()
    assert torch.equal(start[~soft.free], nearest[~soft.free])
    # Decided as it starts, it is at its nearest level wherever that is not a tie.
    assert (soft.committed(soft.up()) == nearest).float().mean() > 0.95


@settings(max_examples=300, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    alpha=st.floats(2.0**-40, 2.0**40, width=32),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_level_is_its_own_nearest(spec: WeightSpec, alpha: float, dtype: torch.dtype) -> None:
    """What committing rests on: ``quantize(fl(q · step))`` is q, for every level and α."""
    levels = spec.level_set()
    index = torch.arange(len(levels)).to(getattr(torch, levels.index_dtype))
    values = apot_fx.dequantize(index, alpha, levels)
    assert torch.equal(apot_fx.quantize(values.to(dtype), alpha, levels), index)


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(2, 15), alpha=st.floats(2.0**-40, 2.0**40, width=32))
def test_so_it_is_up_to_the_largest_unit(bits: int, alpha: float) -> None:
    levels = LevelSet.uniform(bits)
    index = torch.arange(len(levels)).to(getattr(torch, levels.index_dtype))
    assert torch.equal(
        apot_fx.quantize(apot_fx.dequantize(index, alpha, levels), alpha, levels), index
    )


def test_the_sigmoid_reaches_both_ends_and_has_its_inverse() -> None:
    place = torch.linspace(0, 1, 101)
    logits = initial_logits(place)
    assert logits.isfinite().all()
    torch.testing.assert_close(rectified_sigmoid(logits), place, atol=1e-6, rtol=0)
    assert rectified_sigmoid(torch.tensor([-20.0, 20.0])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("beta", [2.0, 7.5, 20.0])
def test_the_regularizer_is_the_papers(beta: float) -> None:
    v = torch.linspace(-4, 4, 33)
    expected = 0.0
    for x in v.tolist():
        h = min(1.0, max(0.0, 1.2 / (1 + math.exp(-x)) - 0.1))
        expected += 1 - abs(2 * h - 1) ** beta
    assert regularizer(v, beta).item() == pytest.approx(expected, rel=1e-5)


def test_beta_falls_from_start_to_end_after_the_warm_start() -> None:
    found = [annealed_beta(step, 100) for step in range(101)]
    assert found[:21] == [20.0] * 21 and found[-1] == pytest.approx(2.0)
    assert all(high >= low for high, low in itertools.pairwise(found))


def test_a_soft_weight_is_no_child_with_keys() -> None:
    layer = nn.Linear(3, 2)
    soft = SoftWeight(layer.weight.detach(), quantizer(layer.weight.detach(), SPECS[1], "channel"))
    assert list(soft.state_dict()) == ["logits"]
