"""AdaRound under its old names, on a uniform grid: grid, loss, and layers that get better."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from apot_fx.compat import AdaptiveRoundingLoss, AdaptiveRoundingOptimizer, AdaroundFakeQuantizer
from apot_fx.compat.adaround_fake_quantize import SymmetricMinMaxObserver
from apot_fx.errors import ApotError, CalibrationError, CompatError, ConfigError, TensorError
from apot_fx.ptq.rounding import annealed_beta, initial_logits, rectified_sigmoid, regularizer

GRID = {"dtype": torch.qint8, "quant_min": -8, "quant_max": 7, "reduce_range": False}


def hook_into(fetched: list[torch.Tensor]):
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        fetched.append(inputs[0].detach())
        fetched.append(output.detach())

    return hook


def test_rounding_maths() -> None:
    v = torch.linspace(-8, 8, 101)
    wanted = (1.2 / (1 + torch.exp(-v.double())) - 0.1).clamp(0, 1)
    torch.testing.assert_close(rectified_sigmoid(v).double(), wanted, rtol=0, atol=1e-6)
    fraction = torch.linspace(0, 0.999, 50)
    torch.testing.assert_close(rectified_sigmoid(initial_logits(fraction)), fraction)
    pushed = (1 - (2 * wanted - 1).abs() ** 4).sum().item()
    assert regularizer(v, 4.0).item() == pytest.approx(pushed, rel=1e-5)
    betas = [annealed_beta(step, 1000) for step in range(1001)]
    assert betas[0] == betas[200] == 20 and betas[1000] == pytest.approx(2)
    assert betas[600] == pytest.approx(11) and betas == sorted(betas, reverse=True)


@pytest.mark.parametrize("dtype", ["own", "torch"])
def test_observer_is_torchs_symmetric_one(dtype: str) -> None:
    x = torch.randn(6, 5, 3)
    per_tensor, per_channel = torch.per_tensor_symmetric, torch.per_channel_symmetric
    ends = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}
    pairs = [
        (SymmetricMinMaxObserver(**ends), MinMaxObserver(qscheme=per_tensor, **ends)),
        (SymmetricMinMaxObserver(qscheme=per_channel, ch_axis=1, **ends),
         PerChannelMinMaxObserver(qscheme=per_channel, ch_axis=1, **ends)),
    ]  # fmt: skip
    for ours, theirs in pairs:
        for batch in (x, 2 * x):
            ours(batch), theirs(batch)
        (scale, zero), (wanted, wanted_zero) = ours.calculate_qparams(), theirs.calculate_qparams()
        torch.testing.assert_close(scale.reshape(-1), wanted.reshape(-1), rtol=2e-7, atol=0)
        assert torch.equal(zero.reshape(-1).long(), wanted_zero.reshape(-1).long())


@pytest.mark.parametrize("observer", [SymmetricMinMaxObserver, MinMaxObserver])
def test_soft_starts_as_the_float_value_and_hard_is_a_grid(observer: type) -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 5)
    fake = AdaroundFakeQuantizer(observer=observer, **GRID)
    soft = fake(x)
    scale, zero_point = fake.calculate_qparams()
    inside = (x / scale >= -8) & (x / scale <= 7)
    torch.testing.assert_close(soft[inside], x[inside], rtol=1e-4, atol=1e-6)
    fake.disable_observer()
    fake.use_soft_rounding = False
    level = fake(x) / scale + zero_point
    torch.testing.assert_close(level, level.round())
    up = (x / scale - (x / scale).floor()) >= 0.5
    wanted = ((x / scale).floor() + up).clamp(-8, 7)
    assert ((level.round() - wanted).abs() > 0).sum() <= 1  # a fraction of one half, rounded


def test_gradients_go_to_v_alone() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    fake = AdaroundFakeQuantizer(**GRID)
    fake(x).sum().backward()
    assert x.grad is None and fake.V.grad is not None and fake.V.grad.shape == x.shape


def test_per_channel_and_state() -> None:
    x = torch.randn(4, 3, 2)
    fake = AdaroundFakeQuantizer(qscheme=torch.per_channel_symmetric, ch_axis=1, **GRID)
    fake(x)
    assert fake.scale.shape == (1, 3, 1)
    fake.disable_observer()
    loaded = AdaroundFakeQuantizer(qscheme=torch.per_channel_symmetric, ch_axis=1, **GRID)
    loaded.load_state_dict(fake.state_dict())
    for other in (loaded, copy.deepcopy(fake)):
        assert torch.equal(other(x), fake(x)) and torch.equal(other.V, fake.V)


def test_what_is_refused() -> None:
    with pytest.raises(AssertionError, match="symmetric scheme") as caught:
        AdaroundFakeQuantizer(qscheme=torch.per_tensor_affine)
    assert isinstance(caught.value, ApotError)
    with pytest.raises(AssertionError, match="quant_min below"):
        AdaroundFakeQuantizer(quant_min=3, quant_max=-3)
    fake = AdaroundFakeQuantizer(**GRID)
    fake.disable_observer()
    with pytest.raises(AssertionError, match="no scale yet"):
        fake(torch.rand(3))
    with pytest.raises(AssertionError, match="max_iter is 10"):
        AdaptiveRoundingLoss(10).rounding_regularization(torch.rand(3), 10)
    with pytest.raises(CalibrationError, match="data is empty"):
        AdaptiveRoundingOptimizer(nn.Linear(2, 2), lambda *a: None, hook_into, [])


def test_channels_that_do_not_fit() -> None:
    def per_channel(**kwargs: int) -> AdaroundFakeQuantizer:
        return AdaroundFakeQuantizer(qscheme=torch.per_channel_symmetric, **kwargs, **GRID)

    with pytest.raises(TensorError, match=r"shape \(\) and no axis 0"):
        per_channel()(torch.tensor(0.3))
    with pytest.raises(TensorError, match=r"shape \(3, 4\) and no axis 5"):
        per_channel(ch_axis=5)(torch.rand(3, 4))
    fake = per_channel(ch_axis=-1)
    assert fake(torch.rand(3, 4)).shape == (3, 4)
    with pytest.raises(TensorError, match="5 channels on axis -1, but 4 before"):
        fake(torch.rand(3, 5))
    fake.disable_observer()
    with pytest.raises(TensorError, match=r"X has shape \(2, 4\), but V .* \(3, 4\)"):
        fake(torch.rand(2, 4))
    with pytest.raises(TensorError, match="X is of type list"):
        fake([1.0])  # type: ignore[arg-type]


def test_fake_tensors() -> None:
    with FakeTensorMode():
        fake = AdaroundFakeQuantizer(**GRID)
        assert fake(torch.rand(3, 4)).shape == (3, 4)
        fake.disable_observer()
        fake.use_soft_rounding = False
        assert fake(torch.rand(3, 4)).shape == (3, 4)


def test_loss() -> None:
    loss = AdaptiveRoundingLoss(max_iter=100, warm_start=0.2, beta_range=(20, 2), reg_param=0.01)
    V, out, wanted = torch.randn(50), torch.randn(8, 3), torch.randn(8, 3)
    regularization, reconstruction = loss(out, wanted, V, curr_iter=19)
    assert regularization == 0 and reconstruction == functional.mse_loss(out, wanted)
    h = (1.2 * torch.sigmoid(V) - 0.1).clamp(0, 1)
    pushed = 0.01 * (1 - (2 * h - 1).abs() ** 11).sum()
    torch.testing.assert_close(loss.rounding_regularization(V, 60), pushed)


class Chain(nn.Module):
    """Three layers in a row, as in PyTorch's suite."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Wrapper(nn.Module):
    def forward(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch)


def to_nearest(model: nn.Module, **ends: int) -> nn.Module:
    rounded = copy.deepcopy(model)
    for module in rounded.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            observer = MinMaxObserver(
                dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, **ends)  # fmt: skip
            observer(module.weight)
            scale, zero = (float(value) for value in observer.calculate_qparams())
            weight = module.weight.data
            low, high = ends["quant_min"], ends["quant_max"]
            weight.copy_(torch.fake_quantize_per_tensor_affine(weight, scale, int(zero), low, high))
    return rounded


CHAINS = {
    "linear": ([nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 6)], (10, 3)),
    "conv": ([nn.Conv2d(3, 4, 5, 5), nn.Conv2d(4, 5, 5, 5), nn.Conv2d(5, 6, 5, 5)],
             (10, 3, 125, 125)),
    "conv1d": ([nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Conv1d(4, 2, 3)],
               (10, 3, 12)),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHAINS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_it_beats_rounding_to_nearest(kind: str, wrapped: bool) -> None:
    torch.manual_seed(0)
    layers, shape = CHAINS[kind]
    model = copy.deepcopy(Chain(layers)).train(not wrapped)
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    data, ends = [torch.rand(shape) for _ in range(8)], {"quant_min": -8, "quant_max": 7}
    calls = (lambda model, batch, wrapper: wrapper(model, batch)) if wrapped else (
        lambda model, batch: model(batch))  # fmt: skip
    optimizer = AdaptiveRoundingOptimizer(
        model, calls, hook_into, data, max_iter=300, batch_size=40,
        feed_forward_wrapper=Wrapper() if wrapped else None, **ends,
    )  # fmt: skip
    rounded = optimizer.run_adaround()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(getattr(m, "inplace", True) for m in model.modules())
    x = torch.cat(data)
    with torch.no_grad():
        wanted = model.eval()(x)
        ours = functional.mse_loss(rounded.eval()(x), wanted)
        nearest = functional.mse_loss(to_nearest(model, **ends)(x), wanted)
    assert ours < nearest
    for module in rounded.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            assert isinstance(module.weight_fake_quant, SymmetricMinMaxObserver)
            scale, _ = module.weight_fake_quant.calculate_qparams()
            levels = module.weight / scale
            torch.testing.assert_close(levels, levels.round())


def optimizer_of(model: nn.Module, data: object, **options: int) -> AdaptiveRoundingOptimizer:
    options = {"max_iter": 20, "quant_min": -8, "quant_max": 7, **options}
    return AdaptiveRoundingOptimizer(model, lambda m, x: m(x), hook_into, data, **options)


def test_wrong_data_models_and_options_are_refused() -> None:
    model, data = nn.Sequential(nn.Linear(4, 4)), [torch.rand(8, 4)]
    with pytest.raises(CalibrationError, match=r"data is a generator.*a list of batches"):
        optimizer_of(model, (x for x in data))
    for option, value in (("max_iter", -1), ("batch_size", 0)):
        with pytest.raises(ConfigError, match=f"{option} is {value}"):
            optimizer_of(model, data, **{option: value})
    with pytest.raises(CalibrationError, match="0 gets or gives NaN or inf"):
        optimizer_of(model, [torch.full((2, 4), float("nan"))]).run_adaround()
    for norm in (nn.utils.weight_norm, nn.utils.parametrizations.weight_norm):
        with pytest.raises(CompatError, match=r"0 computes its weight.*parametrization"):
            optimizer_of(nn.Sequential(norm(nn.Linear(4, 4))), data)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_learns_where_gradients_are_off_and_leaves_none_behind(mode: type) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with mode():
        rounded = optimizer_of(model, [torch.rand(8, 4)]).run_adaround()
    levels = rounded[2].weight / rounded[2].weight_fake_quant.calculate_qparams()[0]
    torch.testing.assert_close(levels, levels.round())
    for one in (model, rounded):
        assert all(p.requires_grad and p.grad is None for p in one.parameters())
    optimizer = optimizer_of(model, [torch.rand(8, 4)])
    assert all(p.grad is None for p in optimizer.run_adaround().parameters())


def test_tied_weights_are_rounded_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    rounded = optimizer_of(model, [torch.rand(8, 4) for _ in range(4)]).run_adaround()
    assert rounded[2].weight is rounded[0].weight
    for layer in (rounded[0], rounded[2]):
        levels = layer.weight / layer.weight_fake_quant.calculate_qparams()[0]
        torch.testing.assert_close(levels, levels.round())
