"""The compiled kernels against the reference, bit for bit, by every instruction set there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from apot_fx import ActivationSpec, LevelSet, WeightSpec
from apot_fx.fake_quant import FakeQuantize
from apot_fx.kernels import dispatch, eager, native, packing, reference, status
from apot_fx.observer import MinMaxObserver, MovingAverageObserver, Observer

LIBRARY = native.loaded()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason=status().reason)
ISAS = native.ISAS if LIBRARY is None else LIBRARY.available

SETS = [
    LevelSet.apot(4, 2, True),
    LevelSet.apot(4, 2, False),
    LevelSet.apot(5, 2, True),
    LevelSet.apot(3, 2, True),
    LevelSet.apot(7, 3, True),
    LevelSet.apot(8, 2, False),
    LevelSet.uniform(8, True),
    LevelSet.uniform(8, False),
    LevelSet.uniform(4, True),
    LevelSet.pot(4, True),
    LevelSet.pot(5, True),
    LevelSet.fp4(),
    LevelSet([-64, -63, 0, 1, 63]),
    LevelSet([0, 1, 2, 5, 127]),
]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0]


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if LIBRARY is None:
        pytest.skip(status().reason)
    LIBRARY.use(request.param)
    yield request.param
    LIBRARY.use(status().isa if status().isa in ISAS else ISAS[0])


def check_same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    """Bits, strides and dtype; any NaN equals any other."""
    assert (mine.dtype, mine.shape, mine.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    nan = mine.isnan()
    assert torch.equal(nan, theirs.isnan())
    mine, theirs = (x.masked_fill(nan, 0).contiguous() for x in (mine, theirs))
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[mine.element_size()]
    assert torch.equal(mine.view(kind), theirs.view(kind))


def check_all(
    x: torch.Tensor, alpha: torch.Tensor, levels: LevelSet, axis: int | None, group: int | None
) -> None:
    where = (levels.spec, axis, group)
    for nan_to_zero in (False, True):
        arguments = (x, alpha, *where, "ste", nan_to_zero)
        check_same(dispatch.fake_quantize(*arguments), reference.fake_quantize(*arguments))
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    for mode in ("ste", "rcf"):
        backward = (grad, x, alpha, *where, mode)
        pairs = zip(
            dispatch.fake_quantize_backward(*backward),
            reference.fake_quantize_backward(*backward),
            strict=True,
        )
        for mine, theirs in pairs:
            check_same(mine, theirs)
    index = dispatch.quantize(x, alpha, *where)
    check_same(index, reference.quantize(x, alpha, *where))
    values = dispatch.dequantize(index, alpha, *where)
    check_same(values, reference.dequantize(index, alpha, *where))


def alpha_of(x: torch.Tensor, axis: int | None, group: int | None) -> torch.Tensor:
    """Some α for every channel or group, the first two out of their limits."""
    if axis is None:
        return torch.tensor(0.7)
    channels = x.shape[axis]
    shape = (
        (channels,) if group is None else (channels, -(-(x.numel() // max(1, channels)) // group))
    )
    alpha = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.1
    if alpha.numel() > 2:
        alpha.view(-1)[:2] = torch.tensor([2.0**-45, 2.0**45])
    return alpha


SHAPES = [
    ((3, 5, 7), 1, None),
    ((70, 3, 9), 0, None),
    ((70, 3, 9), 2, None),
    ((200, 130), 1, None),
    ((3, 9000), 0, None),
    ((150, 2, 3), 1, None),
    ((16, 70), 0, 32),
    ((4, 6, 5), 1, 7),
    ((1, 70), 0, None),
    ((9000,), None, None),
    ((0, 4), 1, None),
    ((4, 0), 0, None),
    ((), None, None),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "axis", "group"), SHAPES)
def test_shapes(
    shape: tuple[int, ...], axis: int | None, group: int | None, dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if x.numel() > 20:
        x.view(-1)[5 : 5 + len(SPECIAL)] = torch.tensor(SPECIAL)
    for levels in SETS:
        check_all(x.to(dtype), alpha_of(x, axis, group), levels, axis, group)


VIEWS = {
    "channels last": lambda x: x.reshape(2, 8, 6, 5).to(memory_format=torch.channels_last),
    "transposed": lambda x: x.reshape(8, 60).t(),
    "gapped": lambda x: x.reshape(12, 40)[:, ::2],
    "reversed axes": lambda x: x.reshape(4, 6, 20).permute(2, 1, 0),
    "chunk": lambda x: x.reshape(3, 160)[:, 70:140],
    "channels": lambda x: x.reshape(2, 3, 8, 10)[:, 1:],
    "channels last chunk": lambda x: x.reshape(2, 120, 2, 1).permute(0, 2, 3, 1)[..., 40:110],
    "transposed chunk": lambda x: x.reshape(3, 160)[:, 5:75].t(),
    "uneven": lambda x: x.reshape(4, 120)[::2, :64].reshape(2, 64)[:, :32].expand(2, 32),
    "backwards": lambda x: x.reshape(2, 240)[:, 100:170].flip(0).t(),
    "expanded": lambda x: x[:6].expand(5, 6),
    "unaligned": lambda x: x[1:].reshape(-1),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strides(view: str) -> None:
    x = VIEWS[view](torch.randn(480, generator=torch.Generator().manual_seed(0)))
    for levels in SETS[:6]:
        for axis in (None, *range(x.dim())):
            check_all(x, alpha_of(x, axis, None), levels, axis, None)
        if x.dim() > 1:
            check_all(x, alpha_of(x, 1, 7), levels, 1, 7)


def test_lengths_and_unaligned_starts() -> None:
    whole = torch.randn(300, generator=torch.Generator().manual_seed(0))
    for length in range(258):
        levels = SETS[length % len(SETS)]
        for start in (0, 1, 3):
            x = whole[start : start + length]
            arguments = (x, torch.tensor(0.9), levels.spec)
            check_same(dispatch.fake_quantize(*arguments), reference.fake_quantize(*arguments))
            check_same(dispatch.quantize(*arguments), reference.quantize(*arguments))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=90),
    st.floats(2.0**-42, 2.0**42, width=32),
    st.sampled_from(SETS),
)
def test_any_floats(values: list[float], alpha: float, levels: LevelSet) -> None:
    check_all(torch.tensor(values), torch.tensor(alpha), levels, None, None)


@pytest.mark.parametrize("levels", SETS, ids=str)
def test_ties_and_their_neighbours(levels: LevelSet) -> None:
    alpha = torch.tensor(0.75)
    ties = torch.tensor(levels.thresholds, dtype=torch.float64) * (0.75 / (2 * levels.unit))
    near = ties.float()
    for _ in range(3):
        below, above = (torch.nextafter(near, torch.tensor(end)) for end in (-9.0, 9.0))
        near = torch.cat([near, below, above]).unique()
    check_all(near, alpha, levels, None, None)


def test_nan_alpha() -> None:
    x = torch.randn(130)
    arguments = (x, torch.tensor(float("nan")), SETS[0].spec, None, None, "ste", True)
    check_same(dispatch.fake_quantize(*arguments), reference.fake_quantize(*arguments))


def test_threads_do_not_change_a_bit() -> None:
    x, grad = torch.randn(2, 300_000, generator=torch.Generator().manual_seed(0))
    rows = x.reshape(300, 1000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            one = (grad, x, torch.tensor(0.8), SETS[0].spec, None, None, "rcf")
            each = (
                grad.view(300, 1000),
                rows,
                alpha_of(rows, 1, None),
                SETS[0].spec,
                1,
                None,
                "rcf",
            )
            found.append(
                [
                    *dispatch.fake_quantize_backward(*one),
                    *dispatch.fake_quantize_backward(*each),
                    dispatch.fake_quantize(x, torch.tensor(0.8), SETS[1].spec),
                    dispatch.ends(x),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ends(dtype: torch.dtype) -> None:
    for count in (0, 1, 31, 64, 100, 40_000):
        x = torch.randn(count).to(dtype)
        assert torch.equal(dispatch.ends(x), reference.ends(x))
        if count > 20:
            x[:10] = torch.tensor(SPECIAL[:3] * 3 + [5.0]).to(dtype)
            assert torch.equal(dispatch.ends(x), reference.ends(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_histogram(dtype: torch.dtype) -> None:
    for count in (0, 1, 31, 64, 100, 40_000):
        x = torch.randn(count).mul(10.0 ** torch.randint(-14, 14, (count,))).to(dtype)
        if count > 20:
            x[:12] = torch.tensor([*SPECIAL, 2.0**40, -(2.0**40)]).to(dtype)
            x[12:15] = torch.tensor([2.0**-40, -(2.0**-41), 2.0**41]).to(dtype)
        ends, counts = dispatch.histogram(x)
        assert torch.equal(ends, reference.ends(x))
        assert torch.equal(counts, reference.histogram(x))
    grid = torch.randn(6, 8, 5, 4).to(memory_format=torch.channels_last)
    for view in (grid, grid[:, ::2]):
        assert torch.equal(dispatch.histogram(view)[1], reference.histogram(view.flatten()))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(width=32), max_size=9), min_size=1, max_size=4),
    st.sampled_from(SETS),
    st.sampled_from([MinMaxObserver, MovingAverageObserver]),
)
def test_following(
    batches: list[list[float]], levels: LevelSet, kind: type[MinMaxObserver]
) -> None:
    """An observer that leads α: in one call as in three."""
    one, other = kind(), kind()
    alpha, expected = torch.ones(()), torch.ones(())
    for turn, batch in enumerate(batches):
        x = torch.tensor(batch, dtype=torch.float32)
        nan_to_zero = bool(turn % 2)
        y = one.follow(x, levels.spec, alpha, nan_to_zero)
        assert Observer.follow(other, x, levels.spec, expected, nan_to_zero) is None
        found = (alpha, one.low, one.high)
        assert all(map(torch.equal, found, (expected, other.low, other.high)))
        assert y is not None
        arguments = (x, alpha, levels.spec, None, None, "ste", nan_to_zero)
        check_same(y, reference.fake_quantize(*arguments))


def test_following_in_several_items_and_dtypes() -> None:
    x = torch.randn(3, 40_000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for kind in (MinMaxObserver, MovingAverageObserver):
            observer, alpha = kind(), torch.ones(())
            for scale in (1.0, 0.5, 2.0):  # α is set, stays, grows
                part = (x * scale).to(dtype).t()
                y = observer.follow(part, SETS[0].spec, alpha, False)
                assert y is not None
                check_same(y, reference.fake_quantize(part, alpha, SETS[0].spec))


@pytest.mark.parametrize("bits", range(1, 9))
def test_packing(bits: int) -> None:
    for count in (*range(40), 65_535, 65_536, 70_001):
        index = torch.randint(2**bits, (count,), dtype=torch.uint8)
        packed = dispatch.pack(index, bits)
        assert torch.equal(packed, packing.pack(index, bits))
        assert torch.equal(dispatch.unpack(packed, bits, [count]), index)
    index = torch.randint(2**bits, (6, 7), dtype=torch.uint8).t()
    assert torch.equal(dispatch.pack(index, bits), packing.pack(index, bits))


@pytest.mark.parametrize(
    ("shape", "axis", "group"), [*SHAPES, ((5, 33_000), 0, None), ((3, 40_000), 0, 128)]
)
def test_quantize_packed(shape: tuple[int, ...], axis: int | None, group: int | None) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for levels in (*SETS[:6], LevelSet.uniform(8, True)):
        for view in (x, x[:0], x.mT.contiguous().mT) if x.dim() > 1 else (x,):
            where = (view, alpha_of(view, axis, group), levels.spec, axis, group)
            expected = packing.pack(reference.quantize(*where), levels.bits)
            assert torch.equal(dispatch.quantize_packed(*where), expected)


def test_eager_and_operator_agree_with_gradients() -> None:
    x = torch.randn(50, 40)
    results = []
    for call in (eager.fake_quantize, torch.ops.apot_fx.fake_quantize):
        value, alpha = x.clone().requires_grad_(), torch.rand(50).add(0.2).requires_grad_()
        with torch.no_grad():
            alpha.copy_(torch.linspace(0.3, 2, 50))
        y = checkpoint(call, value, alpha, SETS[0].spec, 0, None, "rcf", use_reentrant=False)
        (y * x).sum().backward()
        results.append((y, value.grad, alpha.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_negated_views() -> None:
    x = torch.complex(torch.randn(40), torch.randn(40)).conj().imag
    assert x.is_neg()
    arguments = (x, torch.tensor(0.7), SETS[0].spec)
    assert torch.equal(eager.fake_quantize(*arguments), reference.fake_quantize(*arguments))


def test_one_compiled_graph() -> None:
    compiled = torch.compile(eager.fake_quantize, fullgraph=True, backend="aot_eager")
    arguments = (torch.randn(6, 7), torch.tensor(0.7), SETS[0].spec)
    assert torch.equal(compiled(*arguments), eager.fake_quantize(*arguments))


def test_one_compiled_graph_of_modules() -> None:
    weight = FakeQuantize.for_weight(torch.randn(6, 7), WeightSpec(4), "weight").train()
    activation = FakeQuantize.for_activation(ActivationSpec(4), signed=True)
    activation.train()(torch.randn(5, 7))
    x = torch.randn(6, 7)
    for module in (weight, activation):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), module(x))


@pytest.mark.slow
def test_every_float(isa: str) -> None:
    """All 2^32 patterns, against a search among the thresholds in float64."""
    levels, alpha = SETS[0], torch.tensor(1.0)
    thresholds = torch.tensor(levels.thresholds, dtype=torch.float64)
    step = 1 if isa == ISAS[0] else 61  # the others by a sample
    for first in range(-(2**31), 2**31, 2**24 * step):
        last = min(first + 2**24 * step, 2**31)
        x = torch.arange(first, last, step, dtype=torch.int64).to(torch.int32).view(torch.float32)
        t = (x * (2.0 * levels.unit)).double()
        expected = torch.searchsorted(thresholds, t.nan_to_num_(nan=0.0))
        index = dispatch.quantize(x, alpha, levels.spec)
        assert torch.equal(index, expected.to(torch.uint8)), first
