"""What people do with a model every day: save, load, copy, move, average, clip, compile, resume."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import apot_fx
from apot_fx.fake_quant import FakeQuantize


class Whole(nn.Module):
    """One graph: convolution and batch norm, an LSTM, attention, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(6, 8, 3, padding=1, bias=False), nn.BatchNorm1d(8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv(x))).transpose(1, 2)
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.head(x.mean(1))


class Decides(nn.Module):
    """A Python root: stages and standalone layers inside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean(2)
        return self.head(self.body(x) if x.sum() > 0 else self.body(-x))


class Rows(nn.Module):
    """An embedding that the config names, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.up = nn.ConvTranspose1d(8, 6, 4, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up(self.table(x).transpose(1, 2)))
        return self.head(x.mean(2))


MODELS: dict[str, type[nn.Module]] = {"whole": Whole, "python root": Decides, "rows": Rows}
Stage = tuple[Any, list[torch.Tensor]]


def config(name: str) -> Any:
    mapping = apot_fx.QConfigMapping.from_preset("w4a4")
    return mapping.set_module_name("table", "w4") if name == "rows" else mapping


def batches(name: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(1)
    if name == "rows":
        return [torch.randint(11, (4, 5)) for _ in range(4)]
    return [torch.randn(4, 6, 5).to(dtype) for _ in range(4)]


def model(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().eval()


def fresh(name: str, seed: int = 0) -> Any:
    return apot_fx.prepare_apot(model(name, seed), config(name))


def frozen(name: str, seed: int = 0) -> Stage:
    prepared, data = fresh(name, seed), batches(name)
    apot_fx.calibrate(prepared, data, progress=False)
    return prepared.eval(), data


def learn(
    prepared: nn.Module, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]
) -> list[torch.Tensor]:
    prepared.train()
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = prepared(batch).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def adam(prepared: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(prepared.parameters(), lr=1e-2)


def learning(name: str) -> Stage:
    prepared, data = frozen(name)
    learn(prepared, adam(prepared), data)
    return prepared, data


def observing(name: str) -> Stage:
    prepared, data = fresh(name), batches(name)
    prepared(data[0])
    return prepared, data


def converted(name: str) -> Stage:
    prepared, data = frozen(name)
    return apot_fx.convert_apot(prepared), data


def equal_states(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def agrees(prepared: nn.Module, data: list[torch.Tensor]) -> bool:
    """Parity, and the bits of a plain call."""
    prepared.eval()
    lowered = apot_fx.convert_apot(prepared)
    apot_fx.check_parity(prepared, lowered, data).raise_if_failed()
    with torch.no_grad():
        return all(torch.equal(prepared(x), lowered(x)) for x in data)


every_model = pytest.mark.parametrize("name", MODELS)
every_life = pytest.mark.parametrize("make", [observing, frozen, learning, converted])


@every_model
@every_life
def test_state_dicts_travel_into_fresh_models(name: str, make: Callable[[str], Stage]) -> None:
    stage, data = make(name)
    other: nn.Module = fresh(name, seed=5)
    if make is converted:
        other = apot_fx.convert_apot(frozen(name, seed=5)[0])
    file = io.BytesIO()
    torch.save(stage.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert equal_states(stage, other)
    with torch.no_grad():
        for x in data:
            assert torch.equal(stage.eval()(x), other.eval()(x))
    if make in (frozen, learning):
        assert agrees(other, data)


@every_model
def test_float_checkpoints_load_strictly(name: str) -> None:
    prepared, data = frozen(name)
    alphas = {k: v.clone() for k, v in prepared.state_dict().items() if k.endswith("alpha")}
    floats = model(name, seed=7)
    prepared.load_state_dict(floats.state_dict(), strict=True)
    assert all(torch.equal(prepared.state_dict()[k], v) for k, v in alphas.items())
    prepared.apply(apot_fx.disable_fake_quant)
    assert torch.equal(prepared(data[0]), floats(data[0]))


def saved(stage: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(stage, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_model
@every_life
@pytest.mark.parametrize("way", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), saved])
def test_copies_are_the_same(
    name: str, make: Callable[[str], Stage], way: Callable[[Any], Any]
) -> None:
    stage, data = make(name)
    other = way(stage)
    assert equal_states(stage, other) and stage.training == other.training
    stage.eval(), other.eval()
    with torch.no_grad():
        assert all(torch.equal(stage(x), other(x)) for x in data)
    if make is not converted:
        alpha = next(m for m in other.modules() if isinstance(m, FakeQuantize)).alpha
        assert all(alpha is not p for p in stage.parameters())
    if make is learning:
        again = [adam(stage), adam(other)]
        assert learn(stage, again[0], data) == learn(other, again[1], data)
        assert equal_states(stage, other)


@every_model
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("when", ["prepared", "both"])
def test_dtype_moves(name: str, dtype: torch.dtype, when: str) -> None:
    prepared, data = frozen(name)
    expected = prepared(data[0])
    lowered = apot_fx.convert_apot(prepared)
    prepared.to(dtype)
    data = batches(name, dtype)
    for key, value in prepared.state_dict().items():
        if key.endswith(("alpha", ".low", ".high")):
            assert value.dtype == torch.float32, key
    found = prepared(data[0])
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max() + 0.05
    if when == "prepared":
        assert agrees(prepared, data)
        return
    lowered.to(dtype)
    for key, value in lowered.state_dict().items():
        if key.endswith(("alpha", ".s", ".b")):
            assert value.dtype == torch.float32, key
    found = lowered(data[0])
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max() + 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_float_layers_beside_converted_ones_move_along(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    floats = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    prepared, x = apot_fx.prepare_apot(floats.eval()), torch.randn(4, 6)
    apot_fx.calibrate(prepared, [x], progress=False)
    lowered = apot_fx.convert_apot(prepared)
    wanted = lowered(x)
    moved = lowered.to(dtype)(x.to(dtype))
    assert moved.dtype == dtype
    assert (moved.float() - wanted).abs().max() < 0.1 * wanted.abs().max()


@every_model
@pytest.mark.parametrize("use_buffers", [False, True])
def test_weights_can_be_averaged(name: str, use_buffers: bool) -> None:
    prepared, data = frozen(name)
    optimizer = adam(prepared)
    average = AveragedModel(
        prepared, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers
    )
    before = {k: v.clone() for k, v in average.module.named_parameters()}
    for _ in range(3):
        learn(prepared, optimizer, data[:1])
        average.update_parameters(prepared)
    assert any(not torch.equal(before[k], v) for k, v in average.module.named_parameters())
    assert agrees(average.module, data)
    with torch.no_grad():
        assert average.eval()(data[0]).isfinite().all()


@every_model
def test_clipping_and_accumulation(name: str) -> None:
    prepared, data = frozen(name)
    optimizer = adam(prepared.train())
    for part in data[0].split(2):
        prepared(part).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(prepared.parameters(), 1e-3, error_if_nonfinite=True)
    assert norm > 1e-3
    total = torch.stack([p.grad.norm() for p in prepared.parameters() if p.grad is not None]).norm()
    assert total < 1.01e-3
    nn.utils.clip_grad_value_(prepared.parameters(), 1e-4)
    optimizer.step()
    assert agrees(prepared, data)


@every_model
def test_autocast(name: str) -> None:
    prepared, data = frozen(name)
    optimizer = adam(prepared)
    with torch.autocast("cpu", torch.bfloat16):
        losses = learn(prepared, optimizer, data)
        assert all(loss.isfinite() for loss in losses)
        assert agrees(prepared, data)
    assert agrees(prepared, data)


@every_model
@pytest.mark.parametrize("make", [frozen, learning, converted])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode, nullcontext])
def test_grad_modes_give_the_same_bits(
    name: str, make: Callable[[str], Stage], without: Callable[[], Any]
) -> None:
    stage, data = make(name)
    expected = [stage.eval()(x).detach() for x in data]
    with without():
        assert all(torch.equal(stage(x), y) for x, y in zip(data, expected, strict=True))
    assert torch.equal(stage(data[0]).detach(), expected[0])


@every_model
def test_calibration_and_conversion_in_inference_mode(name: str) -> None:
    prepared, data = frozen(name)
    other = fresh(name)
    with torch.inference_mode():
        apot_fx.calibrate(other, data, progress=False)
        lowered = apot_fx.convert_apot(other)
        inside = [lowered(x).clone() for x in data]
    assert equal_states(prepared, other)
    assert all(torch.equal(prepared(x), y) for x, y in zip(data, inside, strict=True))
    assert torch.equal(lowered(data[0]), inside[0])
    assert learn(other, adam(other), data[:1])[0].isfinite()


@every_model
@pytest.mark.parametrize("life", ["eval", "train", "converted"])
def test_compiles(name: str, life: str) -> None:
    torch._dynamo.reset()
    stage, data = converted(name) if life == "converted" else frozen(name)
    stage.train(life == "train")
    twin = copy.deepcopy(stage)
    compiled = torch.compile(twin, backend="aot_eager")
    if life == "train":
        mine, theirs = (
            learn(m, torch.optim.SGD(m.parameters(), 0.1), data[:2]) for m in (stage, compiled)
        )
        assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(mine, theirs, strict=True))
        return
    with torch.no_grad():
        assert all(torch.equal(stage(x), compiled(x)) for x in data[:2])


def checkpointed(prepared: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
    state = [prepared.state_dict(), None if optimizer is None else optimizer.state_dict()]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_model
@pytest.mark.parametrize("calibrates", [True, False])
def test_training_resumes_with_the_same_bits(name: str, calibrates: bool) -> None:
    prepared, data = frozen(name) if calibrates else (fresh(name), batches(name))
    optimizer = adam(prepared)
    learn(prepared, optimizer, data[:2])
    state, moments = checkpointed(prepared, optimizer)
    other = fresh(name, seed=9).train()
    other.load_state_dict(state, strict=True)
    again = adam(other)
    again.load_state_dict(moments)
    assert learn(prepared, optimizer, data[2:]) == learn(other, again, data[2:])
    assert equal_states(prepared, other)
    assert agrees(other, data)


@every_model
def test_observation_resumes_with_the_same_bits(name: str) -> None:
    prepared, data = fresh(name), batches(name)
    kinds = {m.spec.observer for m in prepared.modules() if getattr(m, "observer", None)}
    assert kinds <= {"moving_average"}
    for x in data[:2]:
        prepared(x)
    other = fresh(name, seed=9)
    other.load_state_dict(checkpointed(prepared)[0], strict=True)
    for stage in (prepared, other):
        for x in data[2:]:
            stage(x)
        apot_fx.freeze(stage)
    assert equal_states(prepared, other) and agrees(other, data)
    whole = frozen(name)[0]
    assert equal_states(whole, other)


def weight_only() -> Any:
    mapping = apot_fx.QConfigMapping().set_global("w4")
    return mapping.set_object_type(nn.Embedding, "w4")


@every_model
def test_in_place_weights_are_the_users_until_packed(name: str) -> None:
    floats, x = model(name), batches(name)[0]
    parameters = dict(floats.named_parameters())
    expected = apot_fx.convert_apot(apot_fx.prepare_apot(model(name), weight_only()))(x)
    prepared = apot_fx.prepare_apot(floats, weight_only(), inplace=True)
    mine = dict(prepared.named_parameters())
    assert all(mine[key] is value for key, value in parameters.items())
    weights = {k: weakref.ref(v) for k, v in mine.items() if v.dim() > 1 and "alpha" not in k}
    assert weights
    del mine, parameters
    gc.disable()  # at once, not some time; and though the user still holds floats and prepared
    try:
        lowered = apot_fx.convert_apot(prepared, inplace=True, low_memory=True)
        assert [k for k, ref in weights.items() if ref() is not None] == []
    finally:
        gc.enable()
    assert torch.equal(lowered(x), expected)


class TwoStages(nn.Module):
    """One layer that two stages call."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(6, 6)
        self.one, self.other = nn.Sequential(layer, nn.ReLU()), nn.Sequential(nn.Tanh(), layer)
        self.twice = nn.Sequential(layer, nn.ReLU(), layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(self.one(x)) if x.sum() > 0 else self.twice(self.other(x))


def test_a_layer_that_several_stages_call_is_packed_for_each() -> None:
    torch.manual_seed(0)
    floats, data = TwoStages().eval(), [torch.randn(3, 6) + 1, torch.randn(3, 6) - 1]
    for settings in (config(""), weight_only()):
        prepared = apot_fx.prepare_apot(floats, settings)
        apot_fx.calibrate(prepared, data, progress=False)
        assert agrees(prepared, data)


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 9])
@pytest.mark.parametrize("group_size", [None, 100])
def test_large_weights_are_packed_in_parts_as_in_one(bits: int, group_size: int | None) -> None:
    torch.manual_seed(0)
    x, levels = torch.randn(1171, 517), apot_fx.LevelSet.uniform(bits, True)
    alpha = torch.rand(1171, *(() if group_size is None else (6,))) + 1
    index = apot_fx.quantize(x, alpha, levels, 0, group_size)
    some = [slice(0, 3), slice(500, 517), slice(1170, 1171)]
    for rows in some:
        part = apot_fx.quantize(x[rows], alpha[rows], levels, 0, group_size)
        assert torch.equal(index[rows], part)
    turned = apot_fx.quantize(x.t().contiguous().t(), alpha, levels, 0, group_size)
    assert torch.equal(turned, index)
    packed = apot_fx.pack(index, bits)
    assert packed.numel() == -(-index.numel() * bits // 8)
    assert torch.equal(apot_fx.unpack(packed, bits, tuple(x.shape)), index)
    end = 8 * 70_000  # behind the first part
    tail = apot_fx.pack(index.reshape(-1)[:end][-800:], bits)
    assert torch.equal(packed[: end * bits // 8][-100 * bits :], tail)
