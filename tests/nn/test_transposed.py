"""Transposed and 3-d convolutions: exact against integers, one arithmetic in both stages."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import apot_fx
from apot_fx import ActivationSpec, QConfig, QConfigMapping, WeightSpec
from apot_fx.errors import TensorError
from apot_fx.kernels.products import swap_channels
from apot_fx.nn import ConvertedLayer, TransposedProduct
from tests.kernels.test_products import SWITCHES, switched, weight_only

OPS = torch.ops.apot_fx
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONFIGS = {
    "w4a4": QConfig(WeightSpec(4), ActivationSpec(4)),
    "w8a8": QConfig(WeightSpec(8), ActivationSpec(8)),
    "groups": QConfig(WeightSpec(4, granularity="group", group_size=5), ActivationSpec(4)),
    "tensor": QConfig(WeightSpec(3, granularity="tensor"), ActivationSpec(5)),
    "w4": QConfig(WeightSpec(4)),
    "w4 groups": QConfig(WeightSpec(4, granularity="group", group_size=16)),
}


def scattered(x: np.ndarray, w: np.ndarray, geometry: TransposedProduct) -> np.ndarray:
    """Σ in int64, every input times the kernel added where it lands; ``w`` as torch stores it."""
    groups, inputs = geometry.groups, x.shape[1]
    per, outputs = inputs // groups, w.shape[1] * groups
    kernel = w.shape[2:]
    full = [
        (n - 1) * s + d * (k - 1) + 1 + o
        for n, s, d, k, o in zip(
            x.shape[2:], geometry.stride, geometry.dilation, kernel, geometry.output_padding,
            strict=True,
        )
    ]  # fmt: skip
    out = np.zeros((len(x), outputs, *full), dtype=np.int64)
    for place in np.ndindex(*x.shape[2:]):
        for k in np.ndindex(*kernel):
            at = tuple(
                p * s + d * i
                for p, s, d, i in zip(place, geometry.stride, geometry.dilation, k, strict=True)
            )
            for group in range(groups):
                part = x[:, group * per : (group + 1) * per][(slice(None), slice(None), *place)]
                kern = w[group * per : (group + 1) * per][(slice(None), slice(None), *k)]
                rows = slice(group * w.shape[1], (group + 1) * w.shape[1])
                out[(slice(None), rows, *at)] += part @ kern
    inner = tuple(slice(p, n - p) for p, n in zip(geometry.padding, full, strict=True))
    return out[(slice(None), slice(None), *inner)]


@st.composite
def geometries(draw: Any) -> tuple[TransposedProduct, tuple[int, ...], tuple[int, ...], int]:
    """A geometry, its kernel, the input's spatial sizes, channels per group."""
    rank = draw(st.integers(1, 3))

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(rank))

    stride, dilation, kernel = axes(1, 3), axes(1, 2), axes(1, 3)
    sizes = axes(1, 4 if rank < 3 else 2)
    ends = [s * (n - 1) + d * (k - 1) + 1 for s, n, d, k in
            zip(stride, sizes, dilation, kernel, strict=True)]  # fmt: skip
    padding = tuple(draw(st.integers(0, max(0, (end - 1) // 2))) for end in ends)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    groups = draw(st.integers(1, 3))
    product = TransposedProduct(stride, dilation, groups, padding, extra)
    return product, kernel, sizes, draw(st.integers(1, 2))


@settings(max_examples=60, deadline=None)
@given(geometries(), st.integers(0, 2**31), st.booleans())
def test_sums_are_exact(case: Any, seed: int, wide: bool) -> None:
    product, kernel, sizes, per = case
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-48, 49, (per * product.groups, 2, *kernel), generator=generator)
    x = torch.randint(-48, 49, (2, per * product.groups, *sizes), generator=generator)
    channels = 2 * product.groups
    s, b = torch.rand(channels, generator=generator), torch.randn(channels, generator=generator)
    rows = product.rows(w.float())
    assert rows.shape == (channels, per, *kernel)
    assert torch.equal(product.stored(rows), w.float())
    y = product(x.float(), rows, s, b, None, wide).numpy()
    shape = (-1, *[1] * product.rank)
    acc = scattered(x.numpy(), w.numpy(), product)
    expected = acc.astype(np.float32) * s.numpy().reshape(shape) + b.numpy().reshape(shape)
    assert np.array_equal(y, expected)
    single = product(x[0].float(), rows, s, b, None, wide).numpy()
    assert np.array_equal(single, expected[0])


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_exact_under_switches(switch: str, rank: int, groups: int) -> None:
    product = TransposedProduct((2,) * rank, (1,) * rank, groups, (1,) * rank, (1,) * rank)
    w = torch.randint(-48, 49, (16, 8 // groups, *[3] * rank))
    x = torch.randint(0, 49, (32 if rank < 3 else 4, 16, *[4] * rank))
    acc = product.in_float(x.double(), w.double(), None)
    s, b = torch.ones(8), torch.zeros(8)
    with switched(switch):
        y = product(x.float(), product.rows(w.float()), s, b, None, False)
    assert torch.equal(y.double(), acc)


@settings(max_examples=25, deadline=None)
@given(geometries(), st.integers(1, 9))
def test_group_scales(case: Any, size: int) -> None:
    """Ascending groups along (input channel, kernel) of a row, each with its own exact sum."""
    product, kernel, sizes, per = case
    torch.manual_seed(size)
    w = torch.randint(-9, 10, (per * product.groups, 2, *kernel))
    x = torch.randint(0, 9, (1, per * product.groups, *sizes))
    rows = product.rows(w.float())
    flat = rows.flatten(1)
    count = -(-flat.shape[1] // size)
    s, b = torch.rand(len(rows), count), torch.randn(len(rows))
    total = np.zeros((), dtype=np.float32)
    shape = (-1, *[1] * product.rank)
    for group in range(count):
        part = torch.zeros_like(flat)
        part[:, group * size : (group + 1) * size] = flat[:, group * size : (group + 1) * size]
        stored = product.stored(part.reshape(rows.shape)).long().numpy()
        acc = scattered(x.numpy(), stored, product).astype(np.float32)
        total = total + acc * s[:, group].numpy().reshape(shape)
    y = product(x.float(), rows, s, b, size, False)
    assert np.array_equal(y.numpy(), total + b.numpy().reshape(shape))


@settings(max_examples=25, deadline=None)
@given(geometries(), st.sampled_from([3, 16, 100]))
def test_weight_only_order(case: Any, size: int) -> None:
    """One output: kernel position k of the row meets input (o + padding − dilation·k) / stride."""
    product, kernel, sizes, per = case
    torch.manual_seed(size)
    w = torch.randint(-9, 10, (per * product.groups, 2, *kernel)).float()
    x = torch.randn(1, per * product.groups, *sizes)
    rows = product.rows(w)
    size = min(size, rows[0].numel())
    step, b = torch.rand(len(rows), -(-rows[0].numel() // size)), torch.randn(len(rows))
    y = product.weight_only(x, rows, step, b, size)
    assert y.shape == product.in_float(x, w, None).shape
    for _ in range(3):
        channel = int(torch.randint(len(rows), ()))
        place = tuple(int(torch.randint(n, ())) for n in y.shape[2:])
        first = channel // 2 * per
        patch = []
        for c in range(first, first + per):
            for k in np.ndindex(*kernel):
                at = [
                    divmod(o + p - d * i, t)
                    for o, p, d, i, t in zip(
                        place, product.padding, product.dilation, k, product.stride, strict=True
                    )
                ]
                meets = all(not rest and 0 <= q < n for (q, rest), n in
                            zip(at, sizes, strict=True))  # fmt: skip
                patch.append(float(x[(0, c, *(q for q, _ in at))]) if meets else 0.0)
        wanted = weight_only(
            np.array(patch, dtype=np.float32), rows[channel].flatten().numpy(),
            step[channel].numpy(), float(b[channel]), size,
        )  # fmt: skip
        assert y[(0, channel, *place)].item() == wanted


def network(rank: int) -> nn.Module:
    conv, up, norm = CONVS[rank - 1], TRANSPOSED[rank - 1], NORMS[rank - 1]
    options: dict[str, Any] = {"stride": 2, "padding": 1, "output_padding": 1, "dilation": 2}
    model = nn.Sequential(
        conv(4, 8, 3, padding=1, padding_mode="circular"),
        norm(8),
        nn.ReLU(),
        up(8, 4, 3, groups=2, bias=False, **options),
        norm(4),
        nn.GELU(),
        up(4, 6, 2, stride=2),
        nn.ReLU(),
        conv(6, 4, 2, padding="same", groups=2),
    )
    model.train()(torch.randn(4, 4, *[3] * rank))
    return model.eval()


def stages(
    model: nn.Module, config: Any, *x: Any, **more: Any
) -> tuple[nn.Module, nn.Module, apot_fx.Verdict]:
    """Both stages, their verdict, and everything that every pair must do."""
    mapping = QConfigMapping.of(config) if isinstance(config, QConfig) else config
    prepared = apot_fx.prepare_apot(model, mapping, **more)
    prepared.apply(apot_fx.disable_fake_quant)
    assert torch.equal(prepared(*x), model(*x))
    prepared.apply(apot_fx.enable_fake_quant)
    apot_fx.calibrate(prepared, [x], forward=lambda m, b: m(*b), progress=False)
    prepared.load_state_dict(model.state_dict(), strict=True)
    converted = apot_fx.convert_apot(prepared)
    verdict = apot_fx.check_parity(prepared, converted, [x])
    assert verdict.ok, str(verdict.table())
    assert max(verdict.train_form.values(), default=0.0) < 1e-6
    for stage in (prepared, converted):
        copied, loaded = copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))
        loaded.load_state_dict(stage.state_dict(), strict=True)
        assert torch.equal(copied(*x), stage(*x)) and torch.equal(loaded(*x), stage(*x))
        assert str(apot_fx.explain(stage)) and str(apot_fx.summary(stage))
    return prepared, converted, verdict


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("config", CONFIGS)
def test_in_a_graph(rank: int, config: str) -> None:
    torch.manual_seed(rank)
    x = torch.randn(2, 4, *[3] * rank)
    prepared, converted, verdict = stages(network(rank), CONFIGS[config], x)
    assert len(verdict.train_form) == 4
    assert prepared.get_submodule("3").weight.shape == (8, 2, *[3] * rank)
    quant = prepared.get_submodule("3").weight_fake_quant
    assert config == "tensor" or quant.alpha.shape[0] == 4
    rows = {row["name"]: row for row in apot_fx.explain(prepared).rows}
    assert rows["3"]["op"] == f"ConvTranspose{rank}d" and "4 folded" in rows["3"]["why"]
    sizes = {row["layer"]: row for row in apot_fx.summary(converted).rows}
    assert sizes["3"]["weight"] == "x".join(map(str, (8, 2, *[3] * rank)))
    prepared.train()
    prepared(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0
               for n, p in prepared.named_parameters() if n.endswith("weight"))  # fmt: skip


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_channels_last(last: bool, bits: int) -> None:
    """Results are laid out alike where weights are channels last, and sums in float64."""
    config = QConfig(WeightSpec(bits), ActivationSpec(bits))
    for rank, kind in ((2, torch.channels_last), (3, torch.channels_last_3d)):
        x = torch.randn(2, 4, *[3] * rank)
        x = x.to(memory_format=kind) if last else x
        stages(network(rank).to(memory_format=kind), config, x)


class Functional(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(6, 4, *[2] * rank))
        self.up = nn.Parameter(torch.randn(6, 2, *[3] * rank))
        self.bias = nn.Parameter(torch.randn(4))
        self.conv = getattr(functional, f"conv{rank}d")
        self.convt = getattr(functional, f"conv_transpose{rank}d")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x, self.down, padding=1))
        return self.convt(x, self.up, self.bias, stride=2, output_padding=1, groups=2)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("config", ["w4a4", "w4 groups"])
def test_functional_calls(rank: int, config: str) -> None:
    x = torch.randn(2, 4, *[3] * rank)
    prepared, _, verdict = stages(Functional(rank), CONFIGS[config], x)
    rows = [row for row in apot_fx.explain(prepared).rows if row["form"] == "quantized"]
    assert [row["op"] for row in rows] == [f"conv{rank}d", f"conv_transpose{rank}d"]
    assert len(verdict.train_form) == 2


class Sized(nn.Module):
    """Asks for an output size; ``python`` keeps it out of graphs."""

    def __init__(self, rank: int, python: bool) -> None:
        super().__init__()
        self.down = CONVS[rank - 1](3, 4, 3, stride=2, padding=1)
        self.up = TRANSPOSED[rank - 1](4, 2, 3, stride=2, padding=1)
        self.python = python

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.python and float(x.sum()) > 1e9:
            return x
        return self.up(torch.relu(self.down(x)), output_size=x.shape[2:])


@pytest.mark.parametrize("python", [False, True])
@pytest.mark.parametrize("size", [5, 6])
def test_output_size(python: bool, size: int) -> None:
    for rank in (1, 2, 3):
        x = torch.randn(2, 3, *[size] * rank)
        prepared, converted, _ = stages(Sized(rank, python), CONFIGS["w4a4"], x)
        assert converted(x).shape == (2, 2, *[size] * rank)
        assert prepared.up.standalone
    up = converted.up
    assert isinstance(up, ConvertedLayer)
    small = torch.randn(2, 4, 3, 3, 3)
    assert up(small, [2, 2, 5, 6, 5]).shape == (2, 2, 5, 6, 5)
    for wrong in ([4, 5, 5], [7, 7, 7], [5, 5]):
        with pytest.raises(TensorError, match="output_size"):
            up(small, wrong)
        with pytest.raises(TensorError, match="output_size"):
            prepared.up(input=small, output_size=wrong)


def test_folds_only_with_its_own_channels() -> None:
    """Batch norm counts output channels, which are on axis 1 of a transposed weight."""
    model = nn.Sequential(nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)).eval()
    prepared, _, _ = stages(model, CONFIGS["w4a4"], torch.randn(2, 4, 5))
    assert "1 folded" in apot_fx.explain(prepared, "0").rows[0]["why"]


def test_low_precision_models() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    prepared = apot_fx.prepare_apot(model.bfloat16(), CONFIGS["w4a4"])
    x = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)
    apot_fx.calibrate(prepared, [x], progress=False)
    verdict = apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [x])
    assert verdict.ok and prepared(x).dtype == torch.bfloat16


def test_the_bound_of_sums() -> None:
    """in/groups · kernel products at most: beyond 2^24 prepared sums in float64."""
    levels, inputs = 400, 64  # 400 · 3 products of at most 127 · 255
    model = nn.ConvTranspose1d(levels, 2, 3, stride=1).eval()
    nn.init.constant_(model.weight, 1.0)
    config = QConfig(WeightSpec(8, kind="uniform"), ActivationSpec(8, kind="uniform"))
    x = torch.linspace(0, 1, levels * inputs).reshape(1, levels, inputs)
    _, converted, _ = stages(nn.Sequential(model, nn.ReLU()), config, x)
    assert converted.get_submodule("0").wide


def test_swap_is_its_own_inverse() -> None:
    w = torch.arange(2 * 3 * 4 * 5.0).reshape(6, 4, 5)
    rows = swap_channels(w, 2)
    assert rows.shape == (8, 3, 5) and torch.equal(swap_channels(rows, 2), w)
    assert torch.equal(rows[5], w[3:6, 1])  # group 1, output 1: from inputs 3 to 5
