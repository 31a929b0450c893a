"""LinearAPoT: shifts and adds equal F.linear, on codes and on levels."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from torch._subclasses import FakeTensorMode

from apot_fx.compat import LinearAPoT
from apot_fx.errors import ApotError, TensorError
from tests.compat.oracle import largest_sum, sums

KINDS = [(8, 1, False), (8, 2, False), (4, 2, False), (4, 2, True), (6, 3, True), (12, 4, False)]


def made(b: int, k: int, signed: bool = False, shape: tuple[int, int] = (5, 3)) -> LinearAPoT:
    torch.manual_seed(b + k)
    return LinearAPoT(1000 * torch.rand(shape) - 500 * signed, b, k, signed=signed)


def ints(*shape: int) -> torch.Tensor:
    return torch.randint(0, 255, shape, dtype=torch.float)


@pytest.mark.parametrize(("b", "k", "signed"), KINDS)
def test_forward_is_linear_on_codes(b: int, k: int, signed: bool) -> None:
    layer, x = made(b, k, signed), ints(4, 3)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, functional.linear(x, layer.weight.float()))


@pytest.mark.parametrize(("b", "k", "signed"), KINDS)
def test_forward_levels_is_linear_on_levels(b: int, k: int, signed: bool) -> None:
    layer, x = made(b, k, signed), ints(4, 3)
    meant, top = sums(b, k, signed), largest_sum(b, k)
    unit = layer.level_set.unit
    levels = [[float(meant[code] / top * unit) for code in row] for row in layer.weight.tolist()]
    wanted = torch.tensor(levels, dtype=torch.float64)
    assert torch.equal(layer.levels.double(), wanted.float().double())
    exact = functional.linear(x.double(), wanted)
    assert torch.equal(layer.forward_levels(x), exact.float())
    if unit < 2**12:
        assert torch.equal(layer.forward_levels(x), functional.linear(x, layer.levels))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("scale", [1, 10**12])
def test_sums_beyond_an_integers_range(signed: bool, scale: int) -> None:
    """4096 inputs of 255 at b12k4 pass 2^63; so do large activations at b4k2."""
    for b, k, count in ((12, 4, 4096), (4, 2, 4)):
        if (b, signed) == (12, True):
            continue  # more levels than a set may have
        weight = torch.linspace(-1.0 if signed else 0.5, 1.0, count).expand(2, -1)
        layer = LinearAPoT(weight, b, k, signed=signed)
        x = torch.full((1, count), 255.0 * scale, dtype=torch.float64)
        for found, factors in ((layer(x), layer.weight), (layer.forward_levels(x), layer.levels)):
            wanted = 255 * scale * sum(int(factor) for factor in factors[0].tolist())
            reach = 255 * scale * sum(abs(int(factor)) for factor in factors[0].tolist())
            assert found[0].tolist() == pytest.approx(
                [float(wanted)] * 2, rel=2**-23, abs=reach / 2**50
            )


def test_levels_compile_without_graph_breaks() -> None:
    layer, x = made(4, 2, True), ints(4, 3)
    for product in (layer, layer.forward_levels):
        compiled = torch.compile(product, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), product(x))


def test_the_original_parts_one_by_one() -> None:
    layer, x = made(8, 2), ints(2, 3)
    cut = np.empty((3, 5), dtype=object)
    for row in range(3):
        for column in range(5):
            code = int(layer.weight_transposed[row, column])
            cut[row][column] = layer.decompose_APoT(bin(code))
            assert layer.bitshift_mul(cut[row][column], 37) == 37 * code
    assert torch.equal(layer.matmul(cut, x), layer(x))
    assert layer.decompose_APoT("0b00011011") == ["00", "01", "10", "11"]
    assert layer.decompose_APoT(bin(5)) == ["10", "1"]


def test_attributes() -> None:
    layer = made(4, 2)
    assert layer.weight.shape == (5, 3) and layer.weight_transposed.shape == (3, 5)
    assert (layer.b, layer.k, layer.n) == (4, 2, 2) and len(layer.quantization_levels) == 16
    assert "in_features=3, out_features=5" in repr(layer)


def test_signed_keeps_negative_weights() -> None:
    weight = torch.tensor([[-1.0, 0.5, 1.0]])
    assert LinearAPoT(weight, 4, 2).levels.tolist() == [[0, 24, 48]]
    assert LinearAPoT(weight, 4, 2, signed=True).levels.tolist() == [[-48, 24, 48]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float64, torch.float16])
def test_kinds_of_activation(dtype: torch.dtype) -> None:
    layer, x = made(4, 2), ints(4, 3)
    assert torch.equal(layer(x.to(dtype)), layer(x))
    assert torch.equal(layer.forward_levels(-x), -layer.forward_levels(x))
    wide = torch.stack([x, x], 2)[..., 0]
    assert not wide.is_contiguous() and torch.equal(layer(wide), layer(x))
    assert layer(ints(0, 3)).shape == (0, 5)


def test_what_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"shape \(3,\)"):
        LinearAPoT(torch.rand(3), 4, 2)
    with pytest.raises(AssertionError, match="b=4, k=3") as caught:
        LinearAPoT(torch.rand(3, 3), 4, 3)
    assert isinstance(caught.value, ApotError)
    with pytest.raises(TensorError, match="weight2quantize holds NaN"):
        LinearAPoT(torch.tensor([[float("nan")]]), 4, 2)
    layer = made(4, 2)
    for shape in ((3,), (2, 2, 3), (2, 4)):
        with pytest.raises(AssertionError, match="batch, 3"):
            layer(ints(*shape))
    with pytest.raises(TensorError, match="no integers"):
        layer(torch.full((2, 3), 0.5))
    with pytest.raises(TensorError, match="weight2quantize is of type list"):
        LinearAPoT([[1.0]], 4, 2)  # type: ignore[arg-type]
    blocks = torch.ones(3, 1, dtype=torch.int64)
    for product in (layer, layer.forward_levels, lambda x: layer.matmul(blocks, x)):
        for value in (0.5, float("inf"), float("nan")):
            with pytest.raises(TensorError, match="no integers"):
                product(torch.full((2, 3), value))
        for x in (torch.ones(2, 3).bool(), torch.ones(2, 3) + 0j, [[1.0, 1.0, 1.0]]):
            with pytest.raises(TensorError, match="a real tensor is wanted"):
                product(x)


def test_state_copies_and_fake_tensors() -> None:
    layer, x = made(8, 2), ints(4, 3)
    other = LinearAPoT(torch.ones(5, 3), 8, 2)
    other.load_state_dict(layer.state_dict())
    for one in (other, copy.deepcopy(layer), copy.deepcopy(layer).half()):
        assert torch.equal(one(x), layer(x)) and torch.equal(one.alpha, layer.alpha)
    assert torch.equal(torch.compile(layer, backend="eager")(x), layer(x))
    with FakeTensorMode():
        fake = LinearAPoT(torch.rand(5, 3), 4, 2)
        assert fake(ints(4, 3)).shape == fake.forward_levels(ints(4, 3)).shape == (4, 5)
