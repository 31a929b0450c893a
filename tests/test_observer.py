"""Observers against NumPy, and the search for a weight's α against a dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import apot_fx
from apot_fx import LevelSet
from apot_fx.errors import ConfigError, TensorError
from apot_fx.observer import OBSERVERS, make_observer, weight_alpha

SIGNED, UNSIGNED = LevelSet.apot(4), LevelSet.apot(4, signed=False)
floats = st.lists(st.floats(width=32), min_size=0, max_size=30)


@settings(max_examples=100, deadline=None)
@given(st.lists(floats, min_size=1, max_size=4), st.sampled_from(sorted(OBSERVERS)))
def test_never_breaks_and_stays_in_limits(batches: list[list[float]], name: str) -> None:
    observer = make_observer(name, (), None, None)
    for batch in batches:
        x = torch.tensor(batch, dtype=torch.float32)
        assert observer(x) is x
    finite = [v for batch in batches for v in batch if np.isfinite(v)]
    assert observer.seen == bool(finite)
    for levels in (SIGNED, UNSIGNED):
        alpha = observer.propose(levels)
        assert alpha.shape == () and 2.0**-40 <= float(alpha) <= 2.0**40


def test_min_max_covers_everything() -> None:
    observer = make_observer("minmax", (), None, None)
    for batch in (torch.tensor([0.5, -3.0, float("nan")]), torch.tensor([2.0, float("inf")])):
        observer(batch)
    assert observer.propose(SIGNED) == 3.0 and observer.propose(UNSIGNED) == 2.0
    assert observer.is_signed()
    lopsided = LevelSet([-7, -1, 0, 2])
    assert observer.propose(lopsided) == 7.0  # 2 · 7/2: the positive side needs more


def test_moving_average() -> None:
    observer = make_observer("moving_average", (), None, None)
    for top in (1.0, 2.0, 4.0):
        observer(torch.tensor([0.0, top]))
    assert float(observer.propose(UNSIGNED)) == pytest.approx(1.1 + 0.1 * (4 - 1.1))


def test_all_zero_channels_get_the_smallest_alpha() -> None:
    observer = make_observer("minmax", (2,), 0, None)
    observer(torch.tensor([[0.0, 0.0], [1.0, -2.0]]))
    assert observer.propose(SIGNED).tolist() == [2.0**-40, 2.0]


@pytest.mark.parametrize("name", ["percentile", "mse", "minmax"])
def test_order_does_not_matter_and_merging_is_exact(name: str) -> None:
    parts = [torch.randn(50) * s for s in (0.1, 1.0, 7.0)]
    one, two, half = (make_observer(name, (), None, None) for _ in range(3))
    for part in parts:
        one(part)
    for part in reversed(parts[1:]):
        two(part)
    half(parts[0])
    two.merge(half)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])


def test_percentile_ignores_outliers() -> None:
    observer = make_observer("percentile", (), None, None)
    x = torch.rand(100_000)
    x[0] = 1000.0
    observer(x)
    assert 0.9 < float(observer.propose(UNSIGNED)) < 1.1


def squared_error(x: torch.Tensor, alpha: float, levels: LevelSet) -> float:
    return float((apot_fx.fake_quantize(x, alpha, levels) - x).double().square().sum())


@pytest.mark.parametrize("levels", [SIGNED, UNSIGNED, LevelSet.uniform(3, True), LevelSet.fp4()])
def test_mse_is_near_the_best(levels: LevelSet) -> None:
    torch.manual_seed(1)
    x = torch.randn(20_000).abs() if not levels.signed else torch.randn(20_000)
    observer = make_observer("mse", (), None, None)
    observer(x)
    top = float(x.abs().max())
    best = min(squared_error(x, top * r / 200, levels) for r in range(10, 230))
    assert squared_error(x, float(observer.propose(levels)), levels) <= 1.03 * best
    found = float(weight_alpha(x, levels, "mse", None, None))
    assert squared_error(x, found, levels) <= 1.02 * best


def test_weight_alpha_shapes() -> None:
    weight = torch.randn(6, 4, 3)
    for observer in ("mse", "minmax"):
        assert weight_alpha(weight, SIGNED, observer, None, None).shape == ()
        assert weight_alpha(weight, SIGNED, observer, 0, None).shape == (6,)
        assert weight_alpha(weight, SIGNED, observer, 0, 5).shape == (6, 3)
    rows = weight_alpha(weight, SIGNED, "mse", 0, None)
    for row, part in zip(rows, weight, strict=True):
        assert row == weight_alpha(part, SIGNED, "mse", None, None)
    assert weight_alpha(torch.zeros(2, 3), SIGNED, "mse", 0, None).tolist() == [2.0**-40] * 2


def test_names_and_bad_weights() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'minmax'"):
        make_observer("minmx", (), None, None)
    with pytest.raises(TensorError, match="conv1"):
        weight_alpha(torch.tensor([float("inf")]), SIGNED, "mse", None, None, "conv1.weight")


@pytest.mark.parametrize("name", sorted(OBSERVERS))
def test_state_round_trip(name: str) -> None:
    observer, other = (make_observer(name, (3,), 0, None) for _ in range(2))
    observer(torch.randn(3, 8))
    other.load_state_dict(observer.state_dict(), strict=True)
    assert torch.equal(other.propose(SIGNED), observer.propose(SIGNED))
    observer.reset()
    assert not observer.seen
