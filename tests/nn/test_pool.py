"""Average pools on levels against exact sums, for every option torch has."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

from apot_fx.nn import Pool

WINDOWS = [
    option
    for option in itertools.product((2, 3), (1, 2, 3), (0, 1), (False, True), (False, True))
    if option[2] <= option[0] // 2
]


def expected(levels: torch.Tensor, plain: torch.Tensor, counts: torch.Tensor) -> np.ndarray:
    """fl(sum · fl(step / count)) from torch's float64 average times the count."""
    sums = (plain * counts).round().numpy().astype(np.float32)
    return sums * (np.float32(0.37) / counts.numpy().astype(np.float32))


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil", "include"), WINDOWS)
def test_windows(kernel: int, stride: int, padding: int, ceil: bool, include: bool) -> None:
    x = torch.randint(0, 256, (2, 3, 7, 8)).double()
    two = (kernel, kernel), (stride, stride), (padding, padding)
    pool = Pool("window", 2, *two, ceil_mode=ceil, count_include_pad=include)
    plain = functional.avg_pool2d(x, kernel, stride, padding, ceil, include)
    # torch's own sums: with one as divisor an average is a sum, so counts follow
    sums = functional.avg_pool2d(x + 1, kernel, stride, padding, ceil, include, 1)
    other = functional.avg_pool2d(x, kernel, stride, padding, ceil, include, 1)
    counts = torch.where(plain > 0, (other / plain).round(), torch.ones_like(plain))
    found = pool.exact(x.float(), torch.tensor(0.37))
    assert found.shape == plain.shape == sums.shape
    assert np.array_equal(found.numpy(), expected(x, plain, counts))
    assert torch.equal(pool.plain(x), plain)


@pytest.mark.parametrize("output", [(1, 1), (3, 2), (None, 4), (7, 8)])
def test_adaptive(output: tuple[int | None, int]) -> None:
    x = torch.randint(1, 256, (2, 3, 7, 8)).double()
    pool = Pool("adaptive", 2, output=output)
    plain = functional.adaptive_avg_pool2d(x, output)
    found = pool.exact(x.float(), torch.tensor(1.0)).double()
    assert found.shape == plain.shape and torch.allclose(found, plain, rtol=1e-6)
    assert torch.equal(pool.plain(x), plain)


@pytest.mark.parametrize("keepdim", [False, True])
def test_mean_and_divisor(keepdim: bool) -> None:
    x = torch.randint(0, 256, (2, 3, 7, 8)).double()
    found = Pool("mean", 2, keepdim=keepdim).exact(x.float(), torch.tensor(0.37)).numpy()
    sums = x.sum((2, 3), keepdim=keepdim).numpy().astype(np.float32)
    assert np.array_equal(found, sums * (np.float32(0.37) / np.float32(56)))
    pool = Pool("window", 2, (2, 2), (2, 2), (0, 0), divisor=5)
    sums = functional.avg_pool2d(x, 2, divisor_override=1).numpy().astype(np.float32)
    assert np.array_equal(
        pool.exact(x.float(), torch.tensor(0.37)).numpy(),
        sums * (np.float32(0.37) / np.float32(5)),
    )
