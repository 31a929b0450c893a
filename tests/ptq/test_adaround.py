"""``adaround`` on small models of every kind: better than nearest, exact, and safe."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import apot_fx
from apot_fx import ActivationSpec, QConfig, QConfigMapping, WeightSpec
from apot_fx.errors import ApotError, CalibrationError, ConfigError, StageError, TensorError
from apot_fx.nn import PreparedLayer
from apot_fx.ptq import adaround
from apot_fx.values import same_bits
from tests.nets import calibrated, seeded
from tests.random_models import RandomModel

W3A8 = QConfig.from_preset("w3a8")
Net = Callable[[], nn.Module]


def batches_of(*shape: int, count: int = 3) -> list[torch.Tensor]:
    """Correlated inputs, as real ones are: for white noise the nearest levels are the best."""
    torch.manual_seed(1)
    basis = torch.randn(3, *shape[1:]).flatten(1)
    return [(torch.randn(shape[0], 3) @ basis).view(shape) + 0.3 for _ in range(count)]


def error(model: nn.Module, stage: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        pairs = [(model(x), stage(x)) for x in batches]
    return sum(float((a.double() - b.double()).square().mean()) for a, b in pairs)


def check_exact(prepared: nn.Module, batches: list[Any]) -> nn.Module:
    """Parity of what was committed, from its state_dict too, and of copies."""
    converted = apot_fx.convert_apot(prepared)
    apot_fx.check_parity(prepared, converted, batches).raise_if_failed()
    clone = copy.deepcopy(prepared)
    apot_fx.check_parity(clone, converted, batches).raise_if_failed()
    again = apot_fx.convert_apot(prepared)
    again.load_state_dict(converted.state_dict())
    with torch.no_grad():
        assert same_bits(converted(batches[0]), again(batches[0]))
    return converted


CONV = {"in_channels": 4, "out_channels": 8, "kernel_size": 3, "padding": 1}
NETS: dict[str, tuple[Net, tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)), (8, 12)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(**CONV), nn.GELU(), nn.Conv1d(8, 4, 1)), (6, 4, 9)),
    "grouped and depthwise": (
        lambda: nn.Sequential(
            nn.Conv2d(**CONV, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)
        ),
        (6, 4, 6, 6),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(**CONV), nn.ReLU6()), (4, 4, 3, 4, 5)),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 2, 2)
        ),
        (6, 4, 5, 5),
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_it_beats_the_nearest_levels_and_stays_exact(name: str) -> None:
    build, shape = NETS[name]
    model, batches = seeded(build, shape[1:]), batches_of(*shape)
    prepared = calibrated(model, batches, W3A8)
    alphas = {k: v for k, v in prepared.state_dict().items() if "fake_quant" in k or "post" in k}
    nearest = error(model, prepared, batches)
    table = adaround(prepared, batches, steps=150, progress=False)
    assert error(model, prepared, batches) < 0.9 * nearest
    assert all(row["error after"] < row["error before"] for row in table.rows)
    state = prepared.state_dict()
    assert same_bits(alphas, {key: state[key] for key in alphas})  # α as it was
    check_exact(prepared, batches)


WEIGHTS = [
    WeightSpec(4), WeightSpec(3, kind="uniform"), WeightSpec(4, kind="pot"),
    WeightSpec(kind="fp4", granularity="group", group_size=8),
    WeightSpec(kind="levels", levels=(-5, -2, 0, 1, 3)), WeightSpec(2, granularity="tensor"),
    WeightSpec(8, kind="uniform"),
]  # fmt: skip


@pytest.mark.parametrize("activation", [ActivationSpec(8), None], ids=["a8", "weight-only"])
@pytest.mark.parametrize("spec", WEIGHTS, ids=lambda spec: spec.describe())
def test_every_level_set(spec: WeightSpec, activation: ActivationSpec | None) -> None:
    model, batches = seeded(NETS["linear"][0]), batches_of(32, 12)
    prepared = calibrated(model, batches, QConfig(spec, activation))
    before, float_weight = prepared.get_submodule("0").integer_weight(), model[0].weight.clone()
    nearest = error(model, prepared, batches)
    table = adaround(prepared, batches, steps=100, progress=False)
    layer = prepared.get_submodule("0")
    after, moved = layer.integer_weight(), (layer.integer_weight() != before)
    assert error(model, prepared, batches) < nearest
    assert any(row["moved %"] > 0 for row in table.rows) and moved.any() == (
        table.rows[0]["moved %"] > 0
    )
    assert (after.int() - before.int()).abs().max() == 1
    # Every weight lies on its level, or, beyond the ends, where it was.
    quant = layer.weight_fake_quant
    values = quant(layer.weight.detach())
    assert torch.equal(torch.where(layer.weight == float_weight, values, layer.weight), values)
    assert torch.equal(model[0].weight, float_weight)  # the user's model is another
    check_exact(prepared, batches)


def test_weights_on_a_level_stay() -> None:
    """A pruned weight stays 0, and a second run finds nothing to learn."""
    model, batches = seeded(NETS["linear"][0]), batches_of(32, 12)
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
    prepared = calibrated(model, batches, W3A8)
    adaround(prepared, batches, steps=60, progress=False)
    assert (prepared.get_submodule("0").weight[:, ::2] == 0).all()
    state = copy.deepcopy(prepared.state_dict())
    adaround(prepared, batches, steps=60, seed=3, progress=False)
    assert same_bits(state, prepared.state_dict())


class Unfollowable(nn.Module):
    """A Python root: a stage, and a layer that Python code calls as often as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU())
        self.again, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        h = self.body(x)
        for _ in range(2 if bool((x > -99).all()) else 3):
            h = torch.relu(self.again(h)) + h
        return self.head(h)


def test_a_root_that_cant_be_traced() -> None:
    model, batches = seeded(Unfollowable), batches_of(16, 6)
    prepared = apot_fx.prepare_apot(model, W3A8)
    apot_fx.calibrate(prepared, batches)
    assert type(prepared) is Unfollowable
    nearest, calls = error(model, prepared, batches), prepared.calls
    table = adaround(prepared, batches, steps=150, progress=False)
    rows = {row["weight"]: row for row in table.rows}
    assert rows["body.0.weight"]["learned with"] == "body.0 … body.2"
    assert rows["again.weight"]["learned with"] == "again"
    assert prepared.calls == calls
    assert error(model, prepared, batches) < nearest
    check_exact(prepared, batches)


def test_what_no_batch_ran_is_named() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) if x.sum() < 1e9 else self.idle(x)

    batches = batches_of(16, 6)
    prepared = apot_fx.prepare_apot(Idle(), QConfig(WeightSpec(3)))
    apot_fx.calibrate(prepared, batches)
    rows = {row["weight"]: row for row in adaround(prepared, batches, steps=10, progress=False)}
    assert rows["used.weight"]["why"] != "no batch ran it" == rows["idle.weight"]["why"]


class Recurrent(nn.Module):
    """Time first; attention behind."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, bidirectional=True)
        self.attention = nn.MultiheadAttention(16, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.rnn(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x[-1])


@pytest.mark.parametrize("named", [True, False], ids=["w3a8", "weight-only"])
def test_recurrent_and_attention(named: bool) -> None:
    model, batches = seeded(Recurrent), [x.transpose(0, 1) for x in batches_of(8, 5, 6)]
    mapping = QConfigMapping().set_global(W3A8)
    if named:
        mapping.set_module_name("rnn", W3A8)
    prepared = apot_fx.prepare_apot(model, mapping, example_inputs=batches[0])
    apot_fx.calibrate(prepared, batches)
    nearest = error(model, prepared, batches)
    table = adaround(prepared, batches, steps=60, progress=False)
    assert {"rnn.weight_hh_l0_reverse", "attention.in_proj.weight"} <= {
        str(row["weight"]) for row in table.rows
    }
    assert error(model, prepared, batches) < nearest
    check_exact(prepared, batches)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = seeded(NETS["linear"][0]).to(dtype)
    batches = [x.to(dtype) for x in batches_of(16, 12)]
    for config in (W3A8, QConfig(WeightSpec(8, kind="uniform"))):
        prepared = calibrated(model, batches, config)
        before = prepared.get_submodule("0").integer_weight()
        table = adaround(prepared, batches, steps=60, progress=False)
        moved = (prepared.get_submodule("0").integer_weight() != before).float().mean()
        assert table.rows[0]["moved %"] == pytest.approx(100 * float(moved))
        check_exact(prepared, batches)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_rest_alone() -> None:
    model, batches = seeded(NETS["grouped and depthwise"][0], (4, 6, 6)), batches_of(6, 4, 6, 6)
    states = []
    for seed, limit in ((0, 2**30), (0, 1000), (0, 0), (1, 0)):
        prepared = calibrated(model, batches, W3A8).train()
        prepared.get_submodule("1").eval()
        modes = [module.training for module in prepared.modules()]
        torch.manual_seed(seed)
        random.seed(seed)
        expected = torch.get_rng_state(), random.getstate()
        adaround(prepared, iter(batches), steps=40, seed=seed, cache_limit=limit, progress=False)
        assert torch.equal(torch.get_rng_state(), expected[0]) and random.getstate() == expected[1]
        assert [module.training for module in prepared.modules()] == modes
        assert all(p.requires_grad and p.grad is None for p in prepared.parameters())
        states.append(prepared.state_dict())
    assert same_bits(states[0], states[1]) and same_bits(states[0], states[2])
    assert not same_bits(states[0], states[3])


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_random_models(seed: int, with_example: bool) -> None:
    model = RandomModel(seed).eval()
    batches = [model.batch(3, 6), model.batch(5, 6), model.batch(2, 8)]
    example = batches[0] if with_example else None
    prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=example)
    apot_fx.calibrate(prepared, batches, progress=False)
    table = adaround(prepared, batches, steps=10, progress=False)
    assert {row["weight"] for row in table.rows} >= {
        f"{name}.weight"
        for name, module in prepared.named_modules()
        if isinstance(module, PreparedLayer)
    }
    apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), batches).raise_if_failed()


def test_calls_as_calibrate_was_told() -> None:
    model = seeded(NETS["linear"][0])
    batches = [{"image": x, "label": 3} for x in batches_of(16, 12)]
    prepared = apot_fx.prepare_apot(model, W3A8)
    apot_fx.calibrate(prepared, batches, forward=lambda m, batch: m(batch["image"]))
    adaround(prepared, batches, steps=20, progress=False)
    with torch.inference_mode():
        adaround(prepared, batches, steps=20, progress=False)
    assert all(p.requires_grad for p in prepared.parameters())


def test_it_can_be_trained_on() -> None:
    model, batches = seeded(NETS["linear"][0]), batches_of(16, 12)
    prepared = calibrated(model, batches, W3A8)
    adaround(prepared, batches, steps=20, progress=False)
    prepared.train()(batches[0]).sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())


def test_without_gradient_the_nearest_levels_stay() -> None:
    class Blind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.layer(x).argmax(1) if x.sum() < 1e9 else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.blind = nn.Linear(6, 6), Blind()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.blind(self.first(x)) * 1.0

    batches = batches_of(8, 6)
    prepared = calibrated(seeded(Outer), batches, W3A8)
    before = copy.deepcopy(prepared.state_dict())
    table = adaround(prepared, batches, steps=10, progress=False)
    assert {row["why"] for row in table.rows} == {"nothing better than the nearest was found"}
    assert same_bits(before, prepared.state_dict())


BAD: dict[str, tuple[dict[str, Any], type[ApotError], str]] = {
    "no batch": ({"batches": []}, CalibrationError, "got no batch"),
    "one tensor": ({"batches": torch.randn(2, 12)}, CalibrationError, r"pass \[batch\]"),
    "wrong batch": ({"batches": [torch.randn(2, 5)]}, CalibrationError, "batch 0 does not run"),
    "NaN": ({"batches": [torch.full((2, 12), torch.nan)]}, CalibrationError, "0 … 2 gives NaN"),
    "steps": ({"steps": 0}, ConfigError, "steps is 0"),
    "batch size": ({"batch_size": 1.5}, ConfigError, "batch_size is 1.5"),
    "limit": ({"cache_limit": -1}, ConfigError, "cache_limit is -1"),
    "a bool": ({"steps": True}, ConfigError, "steps is True"),
    "seed": ({"seed": "x"}, ConfigError, "seed is 'x'"),
    "half a seed": ({"seed": 1.5}, ConfigError, r"seed is 1\.5"),
    "large seed": ({"seed": 2**45}, ConfigError, "an int from 0 to 8796093022207"),
    "negative seed": ({"seed": -1}, ConfigError, "seed is -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_leave_the_model_as_it_was(name: str) -> None:
    options, kind, message = BAD[name]
    prepared = calibrated(seeded(NETS["linear"][0]), batches_of(8, 12), W3A8)
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(kind, match=message):
        adaround(prepared, **{"batches": batches_of(8, 12), "progress": False, **options})
    assert same_bits(before, prepared.state_dict())


def test_other_stages_are_refused() -> None:
    model, batches = seeded(NETS["linear"][0]), batches_of(8, 12)
    with pytest.raises(StageError, match=r"adaround wants a prepared model.*prepare_apot first"):
        adaround(model, batches)
    prepared = apot_fx.prepare_apot(model, W3A8)
    with pytest.raises(CalibrationError, match=r"adaround: still observing: 0 .*calibrate"):
        adaround(prepared, batches)
    apot_fx.calibrate(prepared, batches)
    with pytest.raises(StageError, match=r"adaround wants a prepared model.*converted"):
        adaround(apot_fx.convert_apot(prepared), batches)
    prepared.get_submodule("0.weight_fake_quant").observer_enabled = True
    with pytest.raises(StageError, match=r"0\.weight_fake_quant follows its observer"):
        adaround(prepared, batches)
    prepared.apply(apot_fx.disable_observer).apply(apot_fx.disable_fake_quant)
    with pytest.raises(StageError, match=r"switched off"):
        adaround(prepared, batches)
    prepared.apply(apot_fx.enable_fake_quant)
    with torch.no_grad():
        prepared.get_submodule("2").weight[0, 0] = torch.nan
    with pytest.raises(TensorError, match=r"2\.weight holds NaN"):
        adaround(prepared, batches)
