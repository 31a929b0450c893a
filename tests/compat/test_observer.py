"""APoTObserver: values that PyTorch's suite expects, levels against rationals, and the plot."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from apot_fx.compat import APoTObserver
from apot_fx.compat.adaround_fake_quantize import SymmetricMinMaxObserver
from apot_fx.errors import ApotError, CompatError, MissingPackageError, TensorError
from tests.compat.oracle import largest_sum, level_tensor, sums

PAIRS = [(1, 1), (2, 2), (4, 2), (4, 1), (4, 4), (6, 2), (6, 3), (8, 1), (8, 2), (12, 4)]
SETS = [(b, k, signed) for b, k in PAIRS for signed in (False, True)]


def between(b: int, k: int, low: float = 0.0, high: float = 1.0) -> APoTObserver:
    observer = APoTObserver(b=b, k=k)
    observer.min_val, observer.max_val = torch.tensor([low]), torch.tensor([high])
    return observer


@pytest.mark.parametrize(("b", "k", "signed"), SETS)
@pytest.mark.parametrize("alpha", [1.0, 100.23, 3e-5])
def test_levels_codes_and_gamma(b: int, k: int, signed: bool, alpha: float) -> None:
    high = torch.tensor(alpha)
    found = between(b, k, 0.0, alpha).calculate_qparams(signed)
    alpha_, gamma, levels, codes = found
    assert torch.equal(alpha_, high.reshape(1))
    assert gamma.item() == pytest.approx(high.item() / float(largest_sum(b, k)), rel=1e-7)
    expected = level_tensor(b, k, signed, high.item())
    assert levels.dtype == torch.float32 and codes.dtype == torch.int64
    torch.testing.assert_close(levels, expected, rtol=3e-7, atol=0)
    values = sums(b, k, signed)
    assert codes.tolist() == sorted(range(len(values)), key=values.__getitem__)


def test_values_of_the_paper() -> None:
    alpha, gamma, levels, codes = between(4, 2).calculate_qparams(signed=False)
    assert alpha == 1 and gamma == 2 / 3 and len(levels) == 16
    wanted = [0, 0.0208, 0.0417, 0.0625, 0.0833, 0.125, 0.1667, 0.1875, 0.25, 0.3333, 0.375, 0.5,
              0.6667, 0.6875, 0.75, 1]  # fmt: skip
    assert [round(level, 4) for level in levels.tolist()] == wanted
    assert codes.tolist() == [0, 3, 12, 15, 2, 14, 8, 11, 10, 1, 13, 9, 4, 7, 6, 5]
    assert between(6, 1).calculate_qparams(signed=False)[1] == 32 / 63
    assert between(6, 2).calculate_qparams(signed=False)[1] == 1 / 1.75


def test_signed_has_49_entries_and_every_negative() -> None:
    _, _, levels, codes = between(4, 2).calculate_qparams(signed=True)
    assert len(levels) == 49 and sorted(codes.tolist()) == list(range(49))
    assert set(levels.tolist()) == {-level for level in levels.tolist()}


def test_forward_takes_the_larger_magnitude_and_returns_its_input() -> None:
    observer = APoTObserver(b=4, k=2)
    x = torch.tensor([0.0, -100.23, -37.18, 3.42, 8.93, 9.21, 87.92])
    assert observer(x) is x
    assert observer.calculate_qparams(True)[0] == torch.tensor(100.23)
    observer(torch.tensor([[[120.5]]]))
    assert observer.calculate_qparams(False)[0] == 120.5
    assert (observer.min_val, observer.max_val) == (torch.tensor(-100.23), torch.tensor(120.5))


def test_ends_may_be_given_with_the_call() -> None:
    observer = APoTObserver(b=4, k=2)
    ends = {"min_val": torch.tensor([0]), "max_val": torch.tensor([1])}
    assert observer.calculate_qparams(signed=False, **ends)[0] == 1
    assert observer.max_val == 1 and observer.n == 2


@pytest.mark.parametrize(("b", "k"), [(0, 0), (4, 0), (4, 3), (-4, 2), (4.5, 2), (16, 8), (60, 1)])
def test_impossible_b_and_k(b: int, k: int) -> None:
    observer = APoTObserver(b=b, k=k)
    observer(torch.ones(1))
    with pytest.raises(AssertionError, match=f"b={b}, k={k}") as caught:
        observer.calculate_qparams(signed=False)
    assert isinstance(caught.value, ApotError) and isinstance(caught.value, CompatError)


def test_nothing_seen_is_said() -> None:
    for seen in (torch.empty(0, 3), torch.tensor([float("nan"), float("inf")])):
        observer = APoTObserver(b=4, k=2)
        observer(seen)
        with pytest.raises(CompatError, match="saw no finite value"):
            observer.calculate_qparams(signed=False)


def test_what_is_not_finite_is_ignored_and_zeros_have_a_range() -> None:
    observer = APoTObserver(b=4, k=2)
    observer(torch.tensor([1.0, float("nan"), float("-inf")]))
    assert observer.calculate_qparams(False)[0] == 1
    observer = APoTObserver(b=4, k=2)
    observer(torch.zeros(3))
    assert observer.calculate_qparams(True)[0] == 2.0**-40


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_other_dtypes_and_shapes(dtype: torch.dtype) -> None:
    observer = APoTObserver(b=4, k=2)
    observer(torch.tensor(3).to(dtype))
    observer(torch.tensor([[[-5, 1]]]).to(dtype).transpose(0, 2))
    alpha, gamma, levels, _ = observer.calculate_qparams(False)
    assert alpha == 5 and {alpha.dtype, gamma.dtype, levels.dtype} == {torch.float32}


def test_state_copies_and_half_keeps_its_ends() -> None:
    observer = APoTObserver(b=4, k=2)
    observer(torch.tensor([0.1, 100.23]))
    fresh = APoTObserver.with_args(b=4, k=2)()
    fresh.load_state_dict(observer.state_dict())
    fresh.load_state_dict({}, strict=False)
    for other in (fresh, copy.deepcopy(observer)):
        pairs = zip(other.calculate_qparams(True), observer.calculate_qparams(True), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [lambda: APoTObserver(4, 2), SymmetricMinMaxObserver])
def test_a_models_dtype_leaves_the_ends_alone(make: Callable[[], Any], dtype: torch.dtype) -> None:
    plain, moved = make(), make()
    for observer in (plain, moved):
        observer(torch.tensor([0.1, 100.23]))
    nn.Sequential(moved).to(dtype)
    arguments = (False,) if isinstance(plain, APoTObserver) else ()
    assert torch.equal(moved.low, plain.low) and torch.equal(moved.high, plain.high)
    pairs = zip(
        moved.calculate_qparams(*arguments), plain.calculate_qparams(*arguments), strict=True
    )
    assert all(torch.equal(one, two) for one, two in pairs)
    moved(torch.tensor([208.0], dtype=dtype))
    assert moved.high == 208.0


def test_what_is_refused() -> None:
    observer = APoTObserver(b=4, k=2)
    for x in ([1, 2], None, torch.ones(2) + 0j, torch.ones(2).bool()):
        with pytest.raises(TensorError, match=r"APoTObserver: x is .*a real tensor is wanted"):
            observer(x)  # type: ignore[arg-type]
    for ends in ((torch.zeros(3), 1.0), (0.0, torch.ones(3))):
        with pytest.raises(TensorError, match=r"_val has shape \(3,\); one value is wanted"):
            observer.calculate_qparams(False, *ends)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        observer = APoTObserver(b=4, k=2)
        observer(torch.rand(3, 4))
        shapes = [tuple(value.shape) for value in observer.calculate_qparams(True)]
    assert shapes == [(), (), (49,), (49,)]


@pytest.mark.parametrize("signed", [False, True])
def test_the_plot_needs_no_display(signed: bool, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    observer = between(4, 2, -2.0, 2.0)
    figure = observer.quant_levels_visualization(signed=signed)
    xs, ys = figure.axes[0].lines[0].get_data()
    assert len(xs) == 1000 and min(xs) == (-2 if signed else 0) and max(xs) == 2
    assert len(set(ys)) == (39 if signed else 16)
    figure.savefig(tmp_path / "levels.png")
    assert (tmp_path / "levels.png").stat().st_size > 0
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"apot_fx\[plot\]") as caught:
        between(4, 2).quant_levels_visualization()
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, ApotError)
