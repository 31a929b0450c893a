"""Observers against NumPy, and the search for a weight's α against a dense one."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import apot_fx
from apot_fx import ActivationSpec, FakeQuantize, LevelSet, QConfig, WeightSpec
from apot_fx.errors import CalibrationError, ConfigError, StageError, TensorError
from apot_fx.nn.recurrent import show
from apot_fx.observer import OBSERVERS, Observer, make_observer, weight_alpha
from apot_fx.passes.stage import StageModule

MERGING = ["minmax", "percentile", "mse"]
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


def observer_of(batches: list[list[float]], name: str, filler: bool) -> Observer:
    observer = make_observer(name, (), None, None)
    observer.zeros_are_filler = filler
    for batch in batches:
        observe(observer, torch.tensor(batch, dtype=torch.float32))
    return observer


def observe(observer: Observer, x: torch.Tensor) -> None:
    """As a plain layer does, or where zeros are filler as a recurrent one."""
    if observer.zeros_are_filler:
        quant = FakeQuantize.for_activation(ActivationSpec()).eval()
        quant.observer = observer
        show(quant, x)
    else:
        observer(x)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(floats, max_size=3), min_size=1, max_size=5),
    st.sampled_from(MERGING),
    st.booleans(),
    st.data(),
)
def test_merging_is_exact_in_any_order_and_grouping(
    shards: list[list[list[float]]], name: str, filler: bool, data: st.DataObject
) -> None:
    whole = observer_of([batch for shard in shards for batch in shard], name, filler)
    left = [observer_of(shard, name, filler) for shard in shards]
    while len(left) > 1:
        one = left.pop(data.draw(st.integers(0, len(left) - 1)))
        left[data.draw(st.integers(0, len(left) - 1))].merge(one)
    (merged,) = left
    assert merged.seen == whole.seen and merged.is_signed() == whole.is_signed()
    for levels in (SIGNED, UNSIGNED):
        assert torch.equal(merged.propose(levels), whole.propose(levels))
    if not whole.seen_only_zeros:  # how often zeros alone came is of no account
        for key, value in whole.state_dict().items():
            assert torch.equal(value, merged.state_dict()[key])


@pytest.mark.parametrize("name", MERGING)
def test_filler_zeros_of_a_shard_give_way(name: str) -> None:
    zeros, values = [[0.0] * 50], [[0.25, 0.5]]
    for shards in ((zeros, values), (values, zeros), (zeros, zeros, values)):
        merged, *rest = (observer_of(shard, name, filler=True) for shard in shards)
        for other in rest:
            merged.merge(other)
        for key, value in observer_of(values, name, filler=True).state_dict().items():
            assert torch.equal(value, merged.state_dict()[key])


def test_a_moving_average_does_not_merge() -> None:
    one, other = (make_observer("moving_average", (), None, None) for _ in range(2))
    with pytest.raises(CalibrationError, match=r"order of batches.*'minmax'.*'percentile'.*'mse'"):
        one.merge(other)


def prepared(observer: str = "minmax", bits: int = 4, **options: bool) -> StageModule:
    """Two layers; the second one's input is of either sign."""
    config = QConfig(WeightSpec(), ActivationSpec(bits, observer=observer, **options))
    torch.manual_seed(0)
    return apot_fx.prepare_apot(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)), config)


def look(stage: StageModule, batches: list[torch.Tensor], by_hand: bool) -> StageModule:
    """A copy that observed: by ``calibrate``, or by a loop that leaves it observing."""
    stage = copy.deepcopy(stage)
    if not by_hand:
        apot_fx.calibrate(stage, batches, progress=False)
    for batch in batches if by_hand else []:
        with torch.no_grad():
            stage.eval()(batch)
    return stage


#: Only the third has a negative value.
SHARDS = [[torch.rand(4, 6)], [torch.rand(4, 6) * 5, torch.rand(2, 6)], [torch.randn(4, 6)]]


@pytest.mark.parametrize("by_hand", [(False,) * 3, (True,) * 3, (True, False, True)])
@pytest.mark.parametrize("name", MERGING)
def test_merged_shards_are_the_whole(name: str, by_hand: tuple[bool, ...]) -> None:
    base = prepared(name).train(by_hand[1])
    whole = look(base, [batch for shard in SHARDS for batch in shard], by_hand=False).eval()
    x = torch.randn(8, 6)
    for order in itertools.permutations(range(3)):
        first, *rest = [look(base, SHARDS[place], by_hand[place]) for place in order]
        before = [copy.deepcopy(other.state_dict()) for other in rest]
        apot_fx.merge_observers(first, rest)
        assert_same_state(first, whole.state_dict())
        assert first.activation_post_process_0.signed is True
        assert torch.equal(first.eval()(x), whole(x))
        for other, state in zip(rest, before, strict=True):
            assert_same_state(other, state)
    first, *rest = [look(base, shard, hand) for shard, hand in zip(SHARDS, by_hand, strict=True)]
    apot_fx.merge_observers(rest[0], [rest[1]])
    apot_fx.merge_observers(first, [rest[0]])
    assert_same_state(first, whole.state_dict())


def assert_same_state(stage: StageModule, state: dict[str, torch.Tensor]) -> None:
    own = stage.state_dict()
    assert list(own) == list(state)
    for key, value in state.items():
        assert torch.equal(value, own[key]), key


def test_a_shard_may_lack_a_layer_and_what_no_shard_ran_keeps_observing() -> None:
    base = prepared()
    first, other = copy.deepcopy(base), look(base, SHARDS[1], by_hand=False)
    apot_fx.merge_observers(first, [other])
    assert_same_state(first, other.state_dict())
    first = copy.deepcopy(base)
    apot_fx.merge_observers(first, [copy.deepcopy(base)])
    assert_same_state(first, base.state_dict())


def test_a_proved_sign_and_a_running_observer_stay() -> None:
    base = prepared(signed=False)
    first, other = (look(base, shard, by_hand=False) for shard in SHARDS[1:])
    first.apply(apot_fx.enable_observer)
    apot_fx.merge_observers(first, [other])
    quant = first.activation_post_process_0
    assert quant.signed is False and quant.state == "frozen" and quant.observer_enabled


def refused(kind: type[Exception], text: str, first: nn.Module, others: Any) -> None:
    before = copy.deepcopy(first.state_dict())
    with pytest.raises(kind, match=text):
        apot_fx.merge_observers(first, others)
    assert all(torch.equal(value, before[key]) for key, value in first.state_dict().items())


def test_what_does_not_merge_is_refused_and_changes_nothing() -> None:
    one, two = (look(prepared(), shard, by_hand=False) for shard in SHARDS[:2])
    moving = look(prepared("moving_average"), SHARDS[0], by_hand=False)
    name = "activation_post_process_0"
    again = copy.deepcopy(moving)
    refused(CalibrationError, f"{name}: a moving average .*'minmax'", moving, [again])
    learning = copy.deepcopy(two)
    learning.activation_post_process_1.train()
    refused(CalibrationError, "activation_post_process_1: its α learns", one, [two, learning])
    refused(CalibrationError, "activation_post_process_1: its α learns", learning, [two])
    for unlike in (prepared("mse"), prepared(bits=5), prepared(signed=True)):
        refused(StageError, f"{name} is .* in one model and .* in another", one, [two, unlike])
    fewer = apot_fx.prepare_apot(
        nn.Sequential(nn.Linear(6, 5)), QConfig(WeightSpec(), ActivationSpec(observer="minmax"))
    )
    refused(StageError, "only one of the models has 1.weight_fake_quant", one, [fewer])
    refused(StageError, "only one of the models has 1.weight_fake_quant", fewer, [one])
    with torch.no_grad():
        moved = copy.deepcopy(two)
        moved.get_parameter("1.weight").add_(1)
    refused(StageError, "1.weight differs between the models", one, [moved])
    refused(StageError, "the same model twice", one, [one])
    refused(StageError, "the same model twice", one, [two, two])
    refused(StageError, r"pass \[other\]", one, two)
    refused(StageError, "merge_observers wants a prepared model", one, [nn.Linear(6, 5)])
    refused(StageError, "merge_observers wants a prepared model", nn.Linear(6, 5), [one])


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
