"""Recurrent layers: torch's bits in float mode, one arithmetic in both quantized stages."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from apot_fx.config import ActivationSpec, QConfig, WeightSpec
from apot_fx.errors import TensorError
from apot_fx.fake_quant import (
    LEARNING,
    OBSERVING,
    disable_fake_quant,
    enable_observer,
    freeze,
)
from apot_fx.nn.recurrent import RECURRENT, ConvertedRecurrent, PreparedRecurrent
from tests.numpy_oracle import nearest, step_of

CONFIGS = {
    "w4a4": QConfig.from_preset("w4a4"),
    "w8a8": QConfig.from_preset("w8a8"),
    "w4": QConfig(WeightSpec(bits=4)),
    "w4 groups": QConfig(WeightSpec(bits=4, granularity="group", group_size=4)),
    "w4a4 groups": QConfig(
        WeightSpec(bits=4, granularity="group", group_size=4), ActivationSpec(bits=4)
    ),
    "tensor": QConfig(WeightSpec(bits=3, granularity="tensor"), ActivationSpec(bits=5)),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.4},
    {"num_layers": 3, "bias": False},
]
LAYERS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    *((kind, options) for kind in (nn.LSTM, nn.GRU, nn.RNN) for options in OPTIONS),
    (nn.LSTM, {"proj_size": 3}),
    (nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
]
CELLS: list[tuple[type[nn.Module], dict[str, Any]]] = [
    (nn.LSTMCell, {}),
    (nn.GRUCell, {"bias": False}),
    (nn.RNNCell, {}),
    (nn.RNNCell, {"nonlinearity": "relu"}),
]
IDS: dict[str, Any] = {
    "ids": lambda value: getattr(value, "__name__", "") or str(value).replace(" ", "")
}
BATCH, STEPS, INPUTS, HIDDEN = 3, 5, 6, 7


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def inputs_of(layer: Any) -> list[tuple[Any, Any]]:
    """Every way of calling a layer: batched, unbatched and packed, with and without hx."""
    calls: list[tuple[Any, Any]] = []
    if isinstance(layer, nn.RNNCellBase):
        both = isinstance(layer, nn.LSTMCell)
        for outer in ((BATCH,), ()):
            h, c = torch.randn(*outer, HIDDEN), torch.randn(*outer, HIDDEN)
            x = torch.randn(*outer, INPUTS)
            calls += [(x, None), (x, (h, c) if both else h)]
        return calls
    places = layer.num_layers * (2 if layer.bidirectional else 1)

    def hx(*outer: int) -> Any:
        h = torch.randn(places, *outer, layer.proj_size or HIDDEN)
        return (h, torch.randn(places, *outer, HIDDEN)) if isinstance(layer, nn.LSTM) else h

    shape = (BATCH, STEPS) if layer.batch_first else (STEPS, BATCH)
    packed = [torch.randn(length, INPUTS) for length in (3, 5, 1)]
    unsorted = pack_sequence(packed, enforce_sorted=False)
    in_order = pack_sequence(sorted(packed, key=len, reverse=True))
    batched, single = torch.randn(*shape, INPUTS), torch.randn(STEPS, INPUTS)
    calls += [(batched, None), (batched, hx(BATCH)), (single, None), (single, hx())]
    return [*calls, (unsorted, None), (unsorted, hx(BATCH)), (in_order, hx(BATCH))]


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, PackedSequence):
        orders = [order for order in value[1:] if order is not None]
        return [value.data, *orders]
    return (
        [value] if isinstance(value, torch.Tensor) else [t for part in value for t in leaves(part)]
    )


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    for mine, theirs in zip(leaves(found), leaves(wanted), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert torch.equal(mine, theirs)


def make(kind: type[nn.Module], options: dict[str, Any], **more: Any) -> nn.Module:
    return kind(INPUTS, HIDDEN, **options, **more)


def prepare(layer: nn.Module, config: QConfig, calibrated: bool = True) -> Any:
    layer = copy.deepcopy(layer)
    prepared = RECURRENT[type(layer)].take_over(layer, config, "rnn")
    if calibrated:
        prepared.eval()
        with torch.no_grad():
            for x, hx in inputs_of(layer):
                prepared(x, hx)
        freeze(prepared)
    return prepared


@pytest.mark.parametrize(("kind", "options"), LAYERS + CELLS, **IDS)
def test_float_mode_is_torch(kind: type[nn.Module], options: dict[str, Any]) -> None:
    layer = make(kind, options)
    prepared = prepare(layer, CONFIGS["w4a4"], calibrated=False)
    assert isinstance(prepared, kind) and isinstance(prepared, PreparedRecurrent)
    assert set(layer.state_dict()) <= set(prepared.state_dict())
    prepared.apply(disable_fake_quant)
    for training in (False, True):
        for x, hx in inputs_of(layer):
            torch.manual_seed(5)
            wanted = layer.train(training)(x, hx)
            after = torch.rand(1)
            torch.manual_seed(5)
            assert_same(prepared.train(training)(x, hx), wanted)
            assert torch.equal(torch.rand(1), after)  # observing draws no random number
    assert all(quant.observer.seen for quant in prepared.input_fake_quants.values())


@pytest.mark.parametrize(("kind", "options"), LAYERS + CELLS, **IDS)
def test_decomposition_is_close_to_torch(kind: type[nn.Module], options: dict[str, Any]) -> None:
    """The float form of the products, same dropout masks and strides included."""
    layer = make(kind, options, dtype=torch.float64)
    prepared = prepare(layer, CONFIGS["w4a4"], calibrated=False)
    prepared.apply(disable_fake_quant)
    for x, hx in inputs_of(layer):
        x, hx = x.double(), [h.double() for h in hx] if isinstance(hx, tuple) else hx
        hx = hx.double() if isinstance(hx, torch.Tensor) else hx and tuple(hx)
        recurrence = prepared.recurrence
        torch.manual_seed(5)
        wanted = layer(x, hx)
        torch.manual_seed(5)
        found = recurrence.leave(x, prepared._train_form(recurrence.enter(x, hx)))
        for mine, theirs in zip(leaves(found), leaves(wanted), strict=True):
            assert mine.shape == theirs.shape and mine.stride() == theirs.stride()
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("kind", "options"), LAYERS + CELLS, **IDS)
def test_prepared_is_converted(kind: type[nn.Module], options: dict[str, Any], config: str) -> None:
    prepared = prepare(make(kind, options), CONFIGS[config])
    converted = prepared.converted(low_memory=config == "w4").eval()
    assert isinstance(converted, ConvertedRecurrent)
    assert bool(prepared.input_fake_quants) == (CONFIGS[config].activation is not None)
    for x, hx in inputs_of(prepared):
        with torch.no_grad():
            wanted = prepared(x, hx)
        assert_same(converted(x, hx), wanted)
        with_gradient = prepared(x, hx)
        assert all(a.requires_grad for a in leaves(with_gradient) if a.is_floating_point())
        assert_same(
            [a.detach() for a in leaves(with_gradient)], [a.detach() for a in leaves(wanted)]
        )
    assert not any(
        value.is_floating_point() and value.dim() == 2 and value.shape[1] > 2 and "s_" not in key
        for key, value in converted.state_dict().items()
        if "alpha" not in key
    )


def test_train_form_is_near_the_integers() -> None:
    prepared = prepare(nn.LSTM(INPUTS, HIDDEN, num_layers=2, bidirectional=True), CONFIGS["w8a8"])
    x = torch.randn(STEPS, BATCH, INPUTS)
    with torch.no_grad():
        exact, near = prepared.eval()(x)[0], prepared.train()(x)[0]
    # A value on the edge of two levels may fall to either; most do not.
    assert (exact - near).abs().median() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    for config in ("w4a4", "w4"):
        layer = nn.GRU(INPUTS, HIDDEN, dtype=dtype)
        prepared = RECURRENT[nn.GRU].take_over(layer.eval(), CONFIGS[config], "rnn")
        x = torch.randn(STEPS, BATCH, INPUTS, dtype=dtype)
        prepared(x)
        freeze(prepared)
        y, h = prepared(x, torch.zeros(1, BATCH, HIDDEN, dtype=dtype))
        assert y.dtype == h.dtype == dtype
        y.float().sum().backward()
        assert layer.weight_hh_l0.grad is not None
        assert_same(
            [a.detach() for a in leaves(prepared(x))], leaves(list(prepared.converted(False)(x)))
        )


def test_autocast_changes_nothing() -> None:
    prepared = prepare(nn.LSTM(INPUTS, HIDDEN), CONFIGS["w4a4"])
    x = torch.randn(STEPS, BATCH, INPUTS)
    with torch.no_grad():
        wanted = prepared(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(prepared(x), wanted)
            assert_same(prepared.converted(False)(x), wanted)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def lstm_gates(a: np.ndarray, b: np.ndarray, h: np.ndarray, c: np.ndarray) -> Any:
    i, f, g, o = np.split(a + b, 4, axis=-1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gru_gates(a: np.ndarray, b: np.ndarray, h: np.ndarray, c: np.ndarray) -> Any:
    (ra, za, na), (rb, zb, nb) = np.split(a, 3, axis=-1), np.split(b, 3, axis=-1)
    z = sigmoid(za + zb)
    return (1 - z) * np.tanh(na + sigmoid(ra + rb) * nb) + z * h, c


@pytest.mark.parametrize("config", ["w4a4", "w8a8", "tensor"])
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, lstm_gates), (nn.GRU, gru_gates)], **IDS)
def test_numpy_oracle(kind: type[nn.Module], gates: Callable[..., Any], config: str) -> None:
    """Sums in int64 and gates in float64, each step from the state that the module gave."""
    prepared = prepare(kind(INPUTS, HIDDEN), CONFIGS[config])
    x = torch.randn(STEPS, BATCH, INPUTS)
    with torch.no_grad():
        output = prepared(x)[0].numpy()

    def product(key: str, values: np.ndarray) -> np.ndarray:
        inputs = prepared.input_fake_quants[f"activation_post_process_{key}"]
        weights = prepared.weight_fake_quants[f"weight_{key}"]
        alpha, clip = weights.alpha.detach().numpy(), inputs.alpha.detach().numpy()
        levels, weight = weights.level_set.levels, prepared.weights[f"weight_{key}"]
        q_w = nearest(weight.detach().numpy(), alpha[..., None], levels)
        sums = nearest(values, clip, inputs.level_set.levels) @ q_w.T
        s = step_of(clip, inputs.level_set.levels) * step_of(alpha, levels)
        bias = getattr(prepared, f"bias_{key}").detach().numpy()
        return (sums.astype(np.float32) * s + bias).astype(np.float64)

    h, c = np.zeros((BATCH, HIDDEN), np.float32), np.zeros((BATCH, HIDDEN))
    for step in range(STEPS):
        a, b = product("ih_l0", x[step].numpy()), product("hh_l0", h)
        wanted, c = gates(a, b, h.astype(np.float64), c)
        assert np.allclose(output[step], wanted, rtol=0, atol=2e-6)
        h = output[step]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_training_learns(kind: type[nn.Module]) -> None:
    """From prepare on without calibration: the first batch sets α, which then learns."""
    prepared = prepare(kind(INPUTS, HIDDEN, batch_first=True), CONFIGS["w4a4"], calibrated=False)
    head = nn.Linear(HIDDEN, 1)
    prepared.train()
    x = torch.randn(64, STEPS, INPUTS)
    target = x[:, :, :2].sum((1, 2))
    given = [*prepared.parameters(), *head.parameters()]
    optimizer, losses = torch.optim.Adam(given, lr=0.02), []
    before = {name: p.detach().clone() for name, p in prepared.named_parameters()}
    for _ in range(40):
        optimizer.zero_grad()
        loss = (head(prepared(x)[0][:, -1]).squeeze(1) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, quant in {**prepared.input_fake_quants, **prepared.weight_fake_quants}.items():
        assert quant.state == LEARNING, name
    assert all(not torch.equal(p, before[name]) for name, p in prepared.named_parameters())
    prepared.eval()
    with torch.no_grad():
        assert_same(prepared.converted(False)(x), prepared(x))


def test_gradients_are_the_train_form_s() -> None:
    prepared = prepare(nn.GRU(INPUTS, HIDDEN), CONFIGS["w4a4"])
    x = torch.randn(STEPS, BATCH, INPUTS, requires_grad=True)
    prepared(x)[0].sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert prepared.weight_hh_l0.grad.abs().sum() > 0
    exact = x.grad
    x.grad = None
    prepared._train_form(prepared.recurrence.enter(x, None))[0].sum().backward()
    assert torch.equal(x.grad, exact)


@pytest.mark.parametrize(("kind", "options"), [LAYERS[2], LAYERS[6], *CELLS[:2]], **IDS)
@pytest.mark.parametrize("config", ["w4a4", "w4"])
def test_copies(kind: type[nn.Module], options: dict[str, Any], config: str) -> None:
    prepared = prepare(make(kind, options), CONFIGS[config])
    converted = prepared.converted(False)
    x, hx = inputs_of(prepared)[1]
    other = prepare(make(kind, options), CONFIGS[config])
    with torch.no_grad():
        wanted = prepared(x, hx)
        for stage, blank in ((prepared, other), (converted, other.converted(False))):
            assert_same(copy.deepcopy(stage)(x, hx), wanted)
            assert_same(pickle.loads(pickle.dumps(stage))(x, hx), wanted)
            buffer = io.BytesIO()
            torch.save(stage.state_dict(), buffer)
            buffer.seek(0)
            blank.load_state_dict(torch.load(buffer))
            assert_same(blank(x, hx), wanted)
    assert not any(key.startswith("bias") for key in converted.state_dict())
    assert {key for key in converted.state_dict() if key.endswith("packed")} == {
        f"{name}.packed" for name in prepared.weights
    }


def test_half_keeps_scales() -> None:
    converted = prepare(nn.LSTM(INPUTS, HIDDEN), CONFIGS["w4a4"]).converted(False)
    x = torch.randn(STEPS, BATCH, INPUTS)
    wanted = converted(x)
    halved = converted.half()(x)[0]
    assert halved.dtype == torch.float16
    assert (halved.float() - wanted[0]).abs().max() < 0.05
    assert_same(converted.float()(x), wanted)


def test_take_over_keeps_parameters_hooks_and_mode() -> None:
    layer = nn.LSTM(INPUTS, HIDDEN).eval()
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    mine = dict(layer.named_parameters())
    prepared = RECURRENT[nn.LSTM].take_over(layer, CONFIGS["w4a4"], "rnn")
    found = dict(prepared.named_parameters())
    assert all(found[name] is p for name, p in mine.items()) and not prepared.training
    assert not any(quant.training for quant in prepared.input_fake_quants.values())
    prepared(torch.randn(STEPS, BATCH, INPUTS))
    assert seen == [1]
    assert set(prepared.input_fake_quants) == {
        "activation_post_process_ih_l0",
        "activation_post_process_hh_l0",
    }
    layer = nn.LSTM(INPUTS, HIDDEN)
    nn.init.constant_(layer.weight_hh_l0, float("nan"))
    with pytest.raises(TensorError, match=r"rnn\.weight_hh_l0"):
        RECURRENT[nn.LSTM].take_over(layer, CONFIGS["w4a4"], "rnn")


def test_signs() -> None:
    def signs(layer: nn.Module, **more: Any) -> dict[str, bool | None]:
        quants = RECURRENT[type(layer)].take_over(layer, CONFIGS["w4a4"], "", **more)
        named = quants.input_fake_quants.items()
        return {name.removeprefix("activation_post_process_"): q.signed for name, q in named}

    assert signs(nn.GRU(2, 3, 2)) == {"ih_l0": None, "hh_l0": True, "ih_l1": True, "hh_l1": True}
    assert signs(nn.GRUCell(2, 3), signed=False) == {"ih": False, "hh": True}
    assert signs(nn.RNN(2, 3, 2, nonlinearity="relu")) == {
        "ih_l0": None, "hh_l0": None, "ih_l1": False, "hh_l1": None,
    }  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
def test_default_state_tells_no_range(training: bool) -> None:
    """A loop over a cell begins with zeros; α follows the states after them."""
    prepared = prepare(nn.GRUCell(INPUTS, HIDDEN), CONFIGS["w4a4"], calibrated=False)
    prepared.train(training)
    quant = prepared.activation_post_process_hh
    h = prepared(torch.randn(BATCH, INPUTS))
    assert quant.state == OBSERVING and quant.seen
    prepared(torch.randn(BATCH, INPUTS), h)
    assert quant.observer.high == h.max()
    freeze(prepared)
    assert quant.state != OBSERVING and quant.alpha.item() == h.abs().max().item()
    once = prepare(nn.GRU(INPUTS, HIDDEN), CONFIGS["w4a4"], calibrated=False).eval()
    once(torch.randn(1, BATCH, INPUTS))
    freeze(once)  # one step from zeros: nothing else is known, and it converts
    x = torch.randn(STEPS, BATCH, INPUTS)
    assert_same(once.converted(False)(x), tuple(y.detach() for y in once(x)))


def test_enabled_observer_runs_beside() -> None:
    prepared = prepare(nn.GRU(INPUTS, HIDDEN), CONFIGS["w4a4"])
    prepared.apply(enable_observer)
    quant = prepared.activation_post_process_ih_l0
    before = float(quant.alpha)
    x = 10 * torch.randn(STEPS, BATCH, INPUTS)
    for _ in range(3):
        prepared(x)
    assert float(quant.alpha) > before
    wanted = tuple(y.detach() for y in prepared(x))
    assert_same(prepared.converted(False)(x), wanted)


def test_while_observing_weights_are_quantized_and_inputs_pass() -> None:
    """As every prepared layer: what follows is calibrated on what it will get."""
    layer = nn.LSTM(INPUTS, HIDDEN, num_layers=2).eval()
    prepared = prepare(layer, CONFIGS["w4a4"], calibrated=False)
    x = torch.randn(STEPS, BATCH, INPUTS)
    found = leaves(prepared(x))
    for name, quant in prepared.weight_fake_quants.items():
        getattr(layer, name).data = quant(prepared.weights[name]).detach()
    for mine, theirs in zip(found, leaves(layer(x)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_bad_shapes() -> None:
    for layer in (nn.LSTM(INPUTS, HIDDEN), nn.GRU(INPUTS, HIDDEN), nn.GRUCell(INPUTS, HIDDEN)):
        prepared = prepare(layer, CONFIGS["w4a4"])
        x, hx = inputs_of(layer)[1]
        one = tuple(h[..., :1, :] for h in hx) if isinstance(hx, tuple) else hx[..., :1, :]
        for stage in (prepared, prepared.converted(False)):
            with pytest.raises(TensorError, match="hx has shape"):
                stage(x, one)
            with pytest.raises(TensorError, match="features"):
                stage(x[..., :2])
            with pytest.raises(TensorError, match="4-d"):
                stage(torch.zeros(1, 1, 1, INPUTS))
        if not isinstance(layer, nn.GRUCell):
            with pytest.raises(TensorError, match="0 steps"):
                prepared(torch.zeros(0, BATCH, INPUTS))
