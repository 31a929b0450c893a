"""Linear and convolution on levels against NumPy integers, under the switches that break floats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as functional

import apot_fx  # registers the operators

assert apot_fx
OPS = torch.ops.apot_fx


@contextlib.contextmanager
def switched(name: str) -> Iterator[None]:
    """A setting under which float engines are not exact on integers."""
    if name == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield
    elif name == "no mkldnn":
        with torch.backends.mkldnn.flags(enabled=False):
            yield
    elif name == "medium":
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
    else:
        yield


SWITCHES = ["plain", "autocast", "no mkldnn", "medium"]


def finish(acc: np.ndarray, s: torch.Tensor, b: torch.Tensor, rank: int) -> np.ndarray:
    shape = (-1, *[1] * rank)
    return acc.astype(np.float32) * s.numpy().reshape(shape) + b.numpy().reshape(shape)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("batch", [1, 32])
def test_conv_is_exact(switch: str, batch: int) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 49, (batch, 8, 9, 9))
    w = torch.randint(-10, 11, (6, 8, 3, 3))
    s, b = torch.rand(6), torch.randn(6)
    acc = functional.conv2d(x.double(), w.double(), padding=1).numpy()
    with switched(switch):
        y = OPS.conv(x.float(), w.float(), s, b, [1, 1], [1, 1], [1, 1], 1, False)
    assert np.array_equal(y.numpy(), finish(acc, s, b, 2))


@pytest.mark.parametrize("switch", SWITCHES)
def test_linear_is_exact(switch: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randint(-48, 49, (7, 300)), torch.randint(-10, 11, (5, 300))
    s, b = torch.rand(5), torch.randn(5)
    with switched(switch):
        y = OPS.linear(x.float(), w.float(), s, b, False)
    assert np.array_equal(y.numpy(), finish((x.numpy() @ w.numpy().T), s, b, 0))


def test_wide_sums_do_not_round() -> None:
    """Sums beyond 2^24: float32 would lose the last bits."""
    x, w = torch.full((1, 3000), 100.0), torch.full((1, 3000), 100.0)
    w[0, 0] = 99.99 // 1 + 2  # an odd total: 30,000,100
    s, b = torch.ones(1), torch.zeros(1)
    exact = float(np.float32(int((x.double() * w.double()).sum())))
    assert OPS.linear(x, w, s, b, True).item() == exact
    ones = torch.ones(1, 3000, 1)
    y = OPS.conv(x.reshape(1, 3000, 1), w.reshape(1, 3000, 1) * ones, s, b, [1], [0], [1], 1, True)
    assert y.item() == exact


def test_bias_is_always_added() -> None:
    y = OPS.linear(torch.zeros(1, 1), -torch.ones(1, 1), torch.ones(1), torch.zeros(1), False)
    assert not np.signbit(y.item())


@pytest.mark.parametrize("group_size", [4, 7, 18, 100])
def test_grouped_order(group_size: int) -> None:
    x = torch.randint(0, 9, (2, 2, 5, 5))
    w = torch.randint(-9, 10, (3, 2, 3, 3))
    groups = -(-18 // group_size)
    s, b = torch.rand(3, groups), torch.randn(3)
    y = OPS.conv_grouped(x.float(), w.float(), s, b, [1, 1], [0, 0], [1, 1], 1, group_size, False)
    patches = functional.unfold(x.double(), 3).long().numpy()  # (2, 18, 9)
    total = np.zeros((2, 3, 9), dtype=np.float32)
    for group in range(groups):
        span = slice(group * group_size, (group + 1) * group_size)
        acc = np.einsum("ok,bkp->bop", w.reshape(3, -1).numpy()[:, span], patches[:, span])
        total = total + acc.astype(np.float32) * s.numpy()[:, group].reshape(1, -1, 1)
    expected = total + b.numpy().reshape(1, -1, 1)
    assert np.array_equal(y.numpy().reshape(2, 3, 9), expected)
    flat = torch.randint(0, 9, (4, 18))
    linear = OPS.linear_grouped(flat.float(), w.reshape(3, -1).float(), s, b, group_size, False)
    total = np.zeros((4, 3), dtype=np.float32)
    for group in range(groups):
        span = slice(group * group_size, (group + 1) * group_size)
        acc = flat.numpy()[:, span] @ w.reshape(3, -1).numpy()[:, span].T
        total = total + acc.astype(np.float32) * s.numpy()[:, group]
    assert np.array_equal(linear.numpy(), total + b.numpy())


def weight_only(x: np.ndarray, w: np.ndarray, step: np.ndarray, b: float, size: int) -> np.float32:
    """One output of contract 4.8, scalar by scalar."""
    out = [np.float32(0)] * 16
    for group in range(-(-len(x) // size)):
        lanes = [np.float32(0)] * 16
        for k in range(group * size, min((group + 1) * size, len(x))):
            lane = (k - group * size) % 16
            lanes[lane] = np.float32(lanes[lane] + np.float32(x[k] * w[k]))
        out = [
            np.float32(o + np.float32(lane * step[group]))
            for o, lane in zip(out, lanes, strict=True)
        ]
    for half in (8, 4, 2, 1):
        out = [np.float32(out[i] + out[i + half]) for i in range(half)]
    return np.float32(out[0] + np.float32(b))


@pytest.mark.parametrize(("inputs", "size"), [(40, 16), (64, 32), (50, 50), (30, 128), (33, 16)])
def test_weight_only_order(inputs: int, size: int) -> None:
    torch.manual_seed(inputs)
    x, w = torch.randn(3, inputs), torch.randint(-9, 10, (4, inputs)).float()
    step, b = torch.rand(4, -(-inputs // size)), torch.randn(4)
    y = OPS.linear_weight_only(x, w, step, b, size)
    expected = [
        [weight_only(r.numpy(), v.numpy(), t.numpy(), float(o), size)
         for v, t, o in zip(w, step, b, strict=True)]
        for r in x
    ]  # fmt: skip
    assert np.array_equal(y.numpy(), np.array(expected, dtype=np.float32))


def test_weight_only_depends_on_no_batch_or_thread() -> None:
    x, w, b = torch.randn(9, 256), torch.randint(-9, 10, (33, 256)).float(), torch.randn(33)
    step, threads = torch.rand(33, 2), torch.get_num_threads()
    whole = OPS.linear_weight_only(x, w, step, b, 128)
    try:
        torch.set_num_threads(1)
        rows = [OPS.linear_weight_only(row, w, step, b, 128) for row in x]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(whole, torch.stack(rows))
    assert OPS.linear_weight_only(x[:0], w, step, b, 128).shape == (0, 33)
