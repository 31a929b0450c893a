"""The quantizer against an oracle of exact rationals that rounds r and t itself."""

from __future__ import annotations

import bisect
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import apot_fx
from apot_fx import LevelSet

SETS = [
    *(LevelSet.apot(m, 2, signed=False) for m in range(1, 9)),
    *(LevelSet.apot(m + 1, 2, signed=True) for m in range(1, 9)),
    LevelSet.uniform(8, True),
    LevelSet.uniform(8, False),
    LevelSet.pot(4, True),
    LevelSet.fp4(),
    LevelSet.apot(4, 2, True, "torch"),
    LevelSet([-7, -1, 0, 2]),
]
ALPHAS = [1.0, 0.1, 3.7, 2.0**-40, 2.0**40, 1e-3]


def round32(value: Fraction) -> Fraction:
    """To the nearest float32, ties to even; no overflow here."""
    if value == 0:
        return value
    sign, size = (-1, -value) if value < 0 else (1, value)
    exponent = 0
    while size >= 2 ** (exponent + 1):
        exponent += 1
    while size < Fraction(2) ** exponent:
        exponent -= 1
    quantum = Fraction(2) ** (max(exponent, -126) - 23)
    count = size / quantum
    whole = count.numerator // count.denominator
    rest = count - whole
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2):
        whole += 1
    return sign * whole * quantum


def oracle(x: float, alpha: float, levels: LevelSet) -> int:
    """Contract 4.1 word by word, on rationals."""
    if x != x:
        return levels.levels.index(0)
    if abs(x) == float("inf"):
        return len(levels) - 1 if x > 0 else 0
    r = round32(Fraction(2 * levels.unit) / Fraction(alpha))
    t = round32(Fraction(x) * r)
    c = -((-t.numerator) // t.denominator)
    c = min(max(c, 2 * levels.q_min), 2 * levels.q_max)
    return bisect.bisect_left(
        [a + b for a, b in zip(levels.levels, levels.levels[1:], strict=False)], c
    )


def near_thresholds(levels: LevelSet, alpha: float) -> np.ndarray:
    """Every threshold and its neighbours up to 3 ULP, zeros, ends and beyond."""
    thresholds = levels.thresholds if len(levels.thresholds) < 80 else levels.thresholds[::7]
    places = [np.float32(t * alpha / (2 * levels.unit)) for t in thresholds]
    found = [np.float32(v) for v in (0.0, -0.0, alpha, -alpha, 2 * alpha, -2 * alpha, 1e-45)]
    for place in places:
        low = high = place
        found.append(place)
        for _ in range(3):
            low = np.nextafter(low, np.float32(-np.inf))
            high = np.nextafter(high, np.float32(np.inf))
            found += [low, high]
    return np.array(found, dtype=np.float32)


@pytest.mark.parametrize("levels", SETS, ids=lambda s: s.spec)
def test_at_every_threshold(levels: LevelSet) -> None:
    for alpha in (float(np.float32(a)) for a in ALPHAS):
        x = near_thresholds(levels, alpha)
        found = apot_fx.quantize(torch.from_numpy(x), alpha, levels).tolist()
        assert found == [oracle(float(v), alpha, levels) for v in x]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=20),
    st.floats(2.0**-40, 2.0**40, width=32),
    st.sampled_from(SETS),
)
def test_any_values(values: list[float], alpha: float, levels: LevelSet) -> None:
    found = apot_fx.quantize(torch.tensor(values), alpha, levels).tolist()
    assert found == [oracle(v, alpha, levels) for v in values]


@settings(max_examples=100, deadline=None)
@given(st.floats(2.0**-40, 2.0**40, width=32), st.sampled_from(SETS))
def test_idempotent_and_dequantize_rounds_once(alpha: float, levels: LevelSet) -> None:
    index = torch.arange(len(levels)).to(getattr(torch, levels.index_dtype))
    y = apot_fx.dequantize(index, alpha, levels)
    step = np.float32(alpha) / np.float32(levels.unit)
    expected = np.array(levels.levels, dtype=np.float32) * step
    assert np.array_equal(y.numpy(), expected)
    assert torch.equal(apot_fx.quantize(y, alpha, levels), index)
    assert torch.equal(apot_fx.fake_quantize(y, alpha, levels), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_widened(dtype: torch.dtype) -> None:
    levels, x = LevelSet.apot(4), torch.randn(64).to(dtype)
    assert torch.equal(apot_fx.quantize(x, 1.0, levels), apot_fx.quantize(x.float(), 1.0, levels))
    assert apot_fx.fake_quantize(x, 1.0, levels).dtype == dtype


def layouts() -> list[torch.Tensor]:
    base = torch.randn(2, 6, 4, 5)
    return [
        base,
        base.to(memory_format=torch.channels_last),
        base.permute(3, 1, 0, 2),
        base[:, ::2, :, 1:4],
        base[:0],
        base[0, 0, 0, 0],
        base[:1, :1].expand(3, 2, 4, 5),
    ]


@pytest.mark.parametrize("place", range(7))
def test_layouts_and_granularity(place: int) -> None:
    x, levels = layouts()[place], LevelSet.apot(4)
    like = torch.empty_like(x)
    for out in (
        index := apot_fx.quantize(x, 1.0, levels),
        apot_fx.dequantize(index, 1.0, levels),
        apot_fx.fake_quantize(x, 1.0, levels),
    ):
        assert out.shape == x.shape and out.stride() == like.stride()
    if x.dim() < 2:
        return
    for axis in (0, 1, -1):
        size = x.shape[axis]
        alpha = torch.rand(size) + 0.5
        found = apot_fx.quantize(x, alpha, levels, axis)
        assert found.stride() == like.stride()
        for channel in range(size):
            part = apot_fx.quantize(x.select(axis, channel), float(alpha[channel]), levels)
            assert torch.equal(found.select(axis, channel), part)


@pytest.mark.parametrize("group_size", [1, 4, 7, 100])
@pytest.mark.parametrize("axis", [0, 1])
def test_groups_along_the_flattened_rest(group_size: int, axis: int) -> None:
    x, levels = torch.randn(3, 5, 4), LevelSet.apot(4)
    rows = x.movedim(axis, 0).reshape(x.shape[axis], -1)
    groups = -(-rows.shape[1] // group_size)
    alpha = torch.rand(len(rows), groups) + 0.5
    expected = torch.empty(rows.shape, dtype=torch.uint8)
    for channel in range(len(rows)):
        for group in range(groups):
            span = slice(group * group_size, (group + 1) * group_size)
            part = rows[channel, span]
            expected[channel, span] = apot_fx.quantize(part, float(alpha[channel, group]), levels)
    found = apot_fx.quantize(x, alpha, levels, axis, group_size)
    assert torch.equal(found.movedim(axis, 0).reshape(rows.shape), expected)
    y = apot_fx.dequantize(found, alpha, levels, axis, group_size)
    assert torch.equal(apot_fx.fake_quantize(x, alpha, levels, axis, group_size), y)


def test_nan_passes_in_train_and_is_zero_in_eval() -> None:
    x, spec = torch.tensor([float("nan"), 0.4]), LevelSet.apot(4).spec
    op = torch.ops.apot_fx.fake_quantize
    assert op(x, torch.tensor(1.0), spec)[0].isnan()
    evaluated = op(x.to(torch.bfloat16), torch.tensor(1.0), spec, None, None, "ste", True)
    assert evaluated[0] == 0 and evaluated.dtype == torch.float32


def test_alpha_is_clamped_at_use() -> None:
    levels, x = LevelSet.apot(4), torch.randn(8)
    for alpha, limit in ((0.0, 2.0**-40), (-3.0, 2.0**-40), (2.0**50, 2.0**40)):
        found = torch.ops.apot_fx.quantize(x, torch.tensor(alpha), levels.spec)
        assert torch.equal(found, apot_fx.quantize(x, limit, levels))


def test_large_units_search_in_float64() -> None:
    levels = LevelSet.pot(6, signed=True)  # unit 2^30
    x = torch.tensor([1.0, 2.0**-30, -0.4, 0.0, float("nan"), float("-inf"), 0.75, 0.7500001])
    index = apot_fx.quantize(x, 1.0, levels)
    nearest = [levels.levels[i] / levels.unit for i in index.tolist()]
    assert nearest == [1.0, 2.0**-30, -0.5, 0.0, 0.0, -1.0, 0.5, 1.0]
    assert apot_fx.dequantize(index, 1.0, levels).tolist() == nearest


# Gradients


@pytest.mark.parametrize("levels", [SETS[3], SETS[10], LevelSet([-7, -1, 0, 2])])
@pytest.mark.parametrize("where", [(None, None), (0, None), (1, 3)])
def test_gradients_are_those_of_the_surrogate(levels: LevelSet, where: tuple) -> None:
    """α · (c + stop(Q(c) − c)), c = clip(x/α, q_min/M, q_max/M), by finite differences, float64."""
    axis, group = where
    x = torch.randn(4, 5, dtype=torch.float64) * 1.5
    shape = () if axis is None else (4,) if group is None else (5, 2)
    alpha = torch.rand(shape, dtype=torch.float64) + 0.7
    low, high = levels.q_min / levels.unit, levels.q_max / levels.unit

    def spread(a: torch.Tensor) -> torch.Tensor:
        if axis is None:
            return a
        return a[:, None] if group is None else a.repeat_interleave(3, 1)[:, :4].T

    ratio = x / spread(alpha)
    nearest = apot_fx.fake_quantize(x, alpha, levels, axis, group) / spread(alpha)
    residual = nearest - ratio.clamp(low, high)
    away = ((ratio - low).abs() > 1e-3) & ((ratio - high).abs() > 1e-3)
    weights = torch.randn_like(x) * away

    def surrogate(value: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        c = (value / spread(a)).clamp(low, high)
        return (spread(a) * (c + residual) * weights).sum()

    leaf, clip = x.clone().requires_grad_(), alpha.clone().requires_grad_()
    (apot_fx.fake_quantize(leaf, clip, levels, axis, group, "rcf") * weights).sum().backward()
    step = 1e-6
    for tensor, grad, of in ((x, leaf.grad, 0), (alpha, clip.grad, 1)):
        assert grad is not None and grad.dtype == torch.float64
        for place in range(tensor.numel()):
            moved = [tensor.clone() for _ in range(2)]
            moved[0].view(-1)[place] += step
            moved[1].view(-1)[place] -= step
            up, down = ((surrogate(m, alpha) if of == 0 else surrogate(x, m)) for m in moved)
            assert abs(float(up - down) / (2 * step) - float(grad.view(-1)[place])) < 1e-6


def test_straight_through_gives_alpha_none() -> None:
    alpha = torch.tensor(1.0, requires_grad=True)
    x = torch.tensor([-2.0, 0.3, float("nan"), 1.0], requires_grad=True)
    apot_fx.fake_quantize(x, alpha, LevelSet.apot(4)).sum().backward()
    assert x.grad.tolist() == [0, 1, 0, 1] and alpha.grad is None


@pytest.mark.parametrize(("alpha", "sign", "passes"), [
    (2.0**-41, 1, False), (2.0**-41, -1, True), (2.0**41, 1, True), (2.0**41, -1, False),
    (-1.0, -1, True), (1.0, 1, True),
])  # fmt: skip
def test_alpha_outside_only_gets_gradients_back_inside(
    alpha: float, sign: int, passes: bool
) -> None:
    clip = torch.tensor(alpha, requires_grad=True)
    x = torch.full((3,), 2.0**45)
    y = apot_fx.fake_quantize(x, clip, LevelSet.apot(4), grad="rcf")
    (sign * y).sum().backward()
    assert (clip.grad != 0) == passes


def test_dequantize_learns_alpha() -> None:
    levels, alpha = LevelSet.apot(3), torch.tensor([2.0, 3.0], requires_grad=True)
    index = torch.tensor([[0, 6], [1, 3]], dtype=torch.uint8)
    apot_fx.dequantize(index, alpha, levels, 0).sum().backward()
    assert alpha.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("last", [False, True])
def test_large_tensors_are_worked_on_in_parts(last: bool) -> None:
    """The same bits, strides and gradients as piece by piece."""
    torch.manual_seed(0)
    x, levels = torch.randn(2, 64, 72, 72), LevelSet.apot(4)
    x[0, 0, 0, 0] = float("nan")
    x = x.to(memory_format=torch.channels_last) if last else x
    leaf, alpha = x.clone().requires_grad_(), torch.tensor(1.3, requires_grad=True)
    weight = torch.randn_like(x)
    y = apot_fx.fake_quantize(leaf, alpha, levels, grad="rcf")
    (y.nan_to_num() * weight).sum().backward()
    grad, total = torch.empty_like(x), 0.0
    for row in range(2):
        for channel in range(64):
            part, clip = x[row, channel].clone().requires_grad_(), torch.tensor(1.3)
            clip.requires_grad_()
            z = apot_fx.fake_quantize(part, clip, levels, grad="rcf")
            assert torch.equal(z.nan_to_num(), y[row, channel].nan_to_num())
            (z.nan_to_num() * weight[row, channel]).sum().backward()
            grad[row, channel] = part.grad
            total += float(clip.grad)
    assert y.stride() == x.stride() and torch.equal(leaf.grad, grad)
    assert float(alpha.grad) == pytest.approx(total, rel=1e-4)


def test_the_sum_over_parts_decides_for_an_alpha_outside() -> None:
    x = torch.ones(2**20)
    x[: 2**19] *= -1.0
    clip = torch.tensor(2.0**-41, requires_grad=True)
    weight = torch.where(x < 0, 1.0, 0.75)  # most parts alone would lead back, the sum too
    (apot_fx.fake_quantize(x, clip, LevelSet.apot(4), grad="rcf") * weight).sum().backward()
    assert float(clip.grad) == pytest.approx(2**19 * (0.75 - 1.0))
