"""The verbs as their user calls them, and everything they refuse."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

import apot_fx
from apot_fx.errors import (
    CalibrationError,
    ConfigError,
    LevelSetError,
    StageError,
    StateError,
    TensorError,
)
from tests.nets import Branches, Mlp, branches, calibrated, mlp, seeded


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )


# The main job


def test_prepare_leaves_the_model_alone() -> None:
    model, batches = branches()
    before, structure = snapshot(model), repr(model)
    prepared = calibrated(model, batches)
    prepared.train()(batches[0]).sum().backward()
    apot_fx.convert_apot(prepared)
    assert same(before, snapshot(model)) and repr(model) == structure
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("config", ["w4a4", "w8a8", "w4"])
def test_fake_quants_off_give_the_float_bits(config: str) -> None:
    for model, batches in (branches(), mlp()):
        prepared = calibrated(model, batches, config)
        prepared.apply(apot_fx.disable_fake_quant)
        assert torch.equal(prepared(batches[0]), model(batches[0]))


def test_graphs_as_issue_a_wants_them() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    modules = dict(prepared.named_modules())
    layers = [
        n
        for n in prepared.graph.nodes
        if hasattr(modules.get(str(n.target)), "weight")
        and n.op == "call_module"
        and hasattr(modules[str(n.target)], "weight_fake_quant")
    ]
    assert {str(n.target) for n in layers} == {"stem", "left", "right", "join", "head"}
    quants = [n for n in prepared.graph.nodes if "activation_post_process_" in str(n.target)]
    assert all(hasattr(modules[str(n.target)], "observer") for n in quants)
    converted = apot_fx.convert_apot(prepared)
    assert not any("activation_post_process" in key for key in converted.state_dict())
    for name in ("stem", "left", "right", "join", "head"):
        assert f"{name}.weight" not in converted.state_dict()
    assert any(t.dtype == torch.uint8 for t in _values(converted, batches[0]).values())


def _values(stage: fx.GraphModule, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, torch.Tensor):
                found[n.name] = value
            return value

    Keep(stage).run(x)
    return found


def test_indices_flow_from_layer_to_layer() -> None:
    model, batches = branches()
    converted = apot_fx.convert_apot(calibrated(model, batches))
    values = _values(converted, batches[0])
    for node in converted.graph.nodes:
        if node.op == "call_module" and str(node.target) in ("left", "right", "join"):
            assert values[node.args[0].name].dtype == torch.uint8, node.format_node()


def test_training_learns_weights_and_alpha_and_converts_exactly() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    prepared.train()
    assert prepared.activation_post_process_0.state == "learning"
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.05)
    before = snapshot(prepared)
    for _ in range(3):
        loss = prepared(batches[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {
        key for key, value in prepared.state_dict().items() if not torch.equal(before[key], value)
    }
    assert {
        "stem.weight",
        "left.weight_fake_quant.alpha",
        "activation_post_process_1.alpha",
        "norm.running_mean",
    } <= moved
    converted = apot_fx.convert_apot(prepared)
    assert prepared.training and not converted.training
    assert apot_fx.check_parity(prepared, converted, batches).ok


def test_training_without_calibration_initialises_alpha() -> None:
    model, batches = branches()
    prepared = apot_fx.prepare_apot(model.train())
    prepared(batches[0])
    states = {q.state for q in prepared.modules() if isinstance(q, apot_fx.FakeQuantize)}
    assert states == {"learning"}
    assert prepared.activation_post_process_0.signed  # the input: neither proved nor calibrated
    assert apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), batches).ok


def test_eval_can_be_trained_through() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    x = batches[0].clone().requires_grad_()
    with torch.no_grad():
        expected = prepared(batches[0])
    y = prepared(x)
    y.sum().backward()
    assert torch.equal(y, expected) and x.grad is not None and x.grad.abs().sum() > 0
    assert prepared.get_submodule("left").weight.grad is not None


def test_hand_written_calibration_loop() -> None:
    model, batches = mlp()
    prepared = apot_fx.prepare_apot(model)
    for batch in batches:
        prepared(batch)
    with pytest.raises(CalibrationError, match="observed but not frozen"):
        apot_fx.convert_apot(prepared)
    apot_fx.freeze(prepared)
    assert apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), batches).ok


def test_calibration_restores_modes_and_random_state() -> None:
    model, batches = branches()
    prepared = apot_fx.prepare_apot(model)
    prepared.train()
    prepared.get_submodule("norm").eval()
    statistics = prepared.get_submodule("norm").running_mean.clone()
    state = torch.get_rng_state()
    apot_fx.calibrate(prepared, batches)
    assert torch.equal(state, torch.get_rng_state())
    assert prepared.training and not prepared.get_submodule("norm").training
    assert torch.equal(statistics, prepared.get_submodule("norm").running_mean)


def test_calibrating_again_starts_afresh() -> None:
    model, batches = mlp()
    once = calibrated(model, [batches[0]])
    twice = calibrated(model, [batches[1] * 9])
    apot_fx.calibrate(twice, [batches[0]])
    assert same(snapshot(once), snapshot(twice))


def test_inplace_takes_modules_over() -> None:
    model, batches = branches()
    reference = apot_fx.convert_apot(calibrated(model, batches))
    own = copy.deepcopy(model)
    weight = own.get_submodule("left").weight
    prepared = apot_fx.prepare_apot(own, inplace=True)
    assert prepared.get_submodule("left").weight is weight
    apot_fx.calibrate(prepared, batches)
    converted = apot_fx.convert_apot(prepared, inplace=True)
    assert converted is prepared and torch.equal(converted(batches[0]), reference(batches[0]))


def test_low_memory_gives_the_same_bits() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    thrifty = apot_fx.convert_apot(prepared, low_memory=True)
    assert torch.equal(thrifty(batches[0]), apot_fx.convert_apot(prepared)(batches[0]))
    assert apot_fx.check_parity(prepared, thrifty, batches).ok


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save", "state_dict"])
@pytest.mark.parametrize("kind", ["prepared", "converted"])
def test_stages_survive_copies(way: str, kind: str) -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    stage = prepared if kind == "prepared" else converted
    stage(batches[0])  # fills caches, which must not travel
    if way == "deepcopy":
        other = copy.deepcopy(stage)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(stage))
    elif way == "torch.save":
        file = io.BytesIO()
        torch.save(stage, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        fresh = calibrated(seeded(Branches, (3, 8, 8)), [b * 3 for b in batches])
        other = fresh if kind == "prepared" else apot_fx.convert_apot(fresh)
        other.load_state_dict(stage.state_dict(), strict=True)
    assert torch.equal(other(batches[0]), stage(batches[0]))
    assert same(snapshot(other), snapshot(stage))
    pair = (other, converted) if kind == "prepared" else (prepared, other)
    assert apot_fx.check_parity(*pair, batches).ok


def test_state_dict_travels_between_lives() -> None:
    model, batches = branches()
    trained = calibrated(model, batches)
    fresh = apot_fx.prepare_apot(model)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.activation_post_process_0.state == "frozen"
    assert torch.equal(fresh.eval()(batches[0]), trained(batches[0]))


def test_float_checkpoint_loads_strictly_and_keeps_alpha() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    alpha = prepared.activation_post_process_0.alpha.clone()
    other = seeded(lambda: Branches(), (3, 8, 8))
    with torch.no_grad():
        other.get_submodule("left").weight.add_(1)
    prepared.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(prepared.get_submodule("left").weight, other.get_submodule("left").weight)
    assert torch.equal(prepared.activation_post_process_0.alpha, alpha)


def test_users_methods_and_attributes_stay_reachable() -> None:
    class Named(Mlp):
        flavour = "sweet"

        def __init__(self) -> None:
            super().__init__()
            self.size = 12

        def twice(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self(x)

    model, (x, *_) = seeded(Named, (12,)), mlp()[1]
    for stage in (prepared := calibrated(model, [x]), apot_fx.convert_apot(prepared)):
        assert stage.flavour == "sweet" and stage.size == 12
        assert torch.equal(stage.twice(x), 2 * stage(x))
        with pytest.raises(AttributeError):
            _ = stage.flavor


def test_dtype_moves_keep_scales() -> None:
    model, batches = branches()
    converted = apot_fx.convert_apot(calibrated(model, batches))
    before = snapshot(converted)
    converted.half().float()
    assert all(
        torch.equal(value, before[key])
        for key, value in converted.state_dict().items()
        if key.endswith((".s", ".b", "alpha", "packed"))
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes(dtype: torch.dtype) -> None:
    model, batches = mlp()
    batches = [batch.to(dtype) for batch in batches]
    prepared = calibrated(model.to(dtype), batches)
    converted = apot_fx.convert_apot(prepared)
    assert prepared(batches[0]).dtype == converted(batches[0]).dtype == dtype
    assert apot_fx.check_parity(prepared, converted, batches).ok


def test_observers_can_run_beside() -> None:
    model, batches = mlp()
    prepared = calibrated(model, batches)
    before = prepared.activation_post_process_0.alpha.clone()
    prepared.apply(apot_fx.enable_observer)
    prepared(batches[0] * 100)
    assert prepared.activation_post_process_0.alpha > before
    prepared.apply(apot_fx.disable_observer)
    moved = prepared.activation_post_process_0.alpha.clone()
    prepared(batches[0] * 1000)
    assert torch.equal(prepared.activation_post_process_0.alpha, moved)


# How batches are passed


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> Any:
        first = self.a(x) * scale
        return {"sum": first + self.b(y), "first": first}


def test_tuples_dicts_and_forward() -> None:
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    model = seeded(Two)
    with pytest.warns(UserWarning, match=r"batch\[2:\] not passed: forward\(x, y\)"):
        one = calibrated(model, [(x, y, torch.ones(3))])
    two = calibrated(model, [{"x": x, "y": y}])
    prepared = apot_fx.prepare_apot(model)
    calls: list[int] = []

    def forward(stage: nn.Module, batch: Any) -> Any:
        calls.append(1)
        return stage(batch["features"], y=batch["other"])

    apot_fx.calibrate(prepared, [{"features": x, "other": y}], forward)
    assert same(snapshot(one), snapshot(two)) and same(snapshot(two), snapshot(prepared))
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, [{"features": x, "other": y}]).ok
    assert len(calls) == 4  # calibrate, prepared twice, converted


def test_data_loader() -> None:
    model, _ = mlp()
    data = torch.utils.data.TensorDataset(torch.randn(20, 12), torch.zeros(20))
    loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
    prepared = calibrated(model, loader)  # type: ignore[arg-type]
    assert apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), loader).ok


# What is refused, typed, by name, with nothing changed


def unchanged(prepared: nn.Module, error: type[Exception], match: str, batches: Any) -> None:
    before = snapshot(prepared)
    with pytest.raises(error, match=match):
        apot_fx.calibrate(prepared, batches)
    assert same(before, snapshot(prepared))


def test_calibrate_refuses() -> None:
    model, batches = mlp()
    prepared = apot_fx.prepare_apot(model)
    unchanged(prepared, CalibrationError, "no batch", [])
    unchanged(prepared, CalibrationError, "iterable of batches", batches[0])
    unchanged(prepared, CalibrationError, "Did you mean 'x'", [{"xs": batches[0]}])
    unchanged(prepared, CalibrationError, "requires 1", [()])
    unchanged(prepared, CalibrationError, "batch 1 does not run", [batches[0], torch.randn(3, 7)])
    unchanged(prepared, CalibrationError, "type int", [3])

    def breaks() -> Iterator[torch.Tensor]:
        yield batches[0]
        raise OSError("disk")

    unchanged(prepared, OSError, "disk", breaks())
    with pytest.raises(StageError, match="call prepare_apot first"):
        apot_fx.calibrate(model, batches)


def test_prepare_refuses() -> None:
    model, batches = branches()
    with pytest.raises(ConfigError, match="Did you mean 'w4a4'"):
        apot_fx.prepare_apot(model, "w4a44")
    names = apot_fx.QConfigMapping.from_preset("w4a4").set_module_name("lefd", "w8a8")
    with pytest.raises(ConfigError, match="Did you mean 'left'"):
        apot_fx.prepare_apot(model, names)
    with pytest.raises(StageError, match="an nn"):
        apot_fx.prepare_apot(3)  # type: ignore[arg-type]
    prepared = calibrated(model, batches)
    for stage in (prepared, apot_fx.convert_apot(prepared), nn.Sequential(prepared)):
        with pytest.raises(StageError, match="float model"):
            apot_fx.prepare_apot(stage)
    with pytest.raises(LevelSetError):
        apot_fx.WeightSpec(bits=6, k=3)
    with torch.no_grad():
        model.get_submodule("join").weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(TensorError, match=r"join\.weight"):
        apot_fx.prepare_apot(model)


def test_untraceable_root_is_kept_and_names_the_line() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
            self.head = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x)) if x.sum() > 0 else -x

    model, x = Decides().eval(), torch.rand(3, 4)
    prepared = apot_fx.prepare_apot(model)
    assert type(prepared) is Decides and prepared.state_dict().keys() > model.state_dict().keys()
    apot_fx.calibrate(prepared, [x])
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, [x, -x]).ok
    why = apot_fx.explain(prepared, "(root)").rows[0]["why"]
    assert re.search(r"test_pipeline.py:\d+", str(why))


def test_convert_refuses() -> None:
    model, batches = branches()
    with pytest.raises(StageError, match="call prepare_apot first"):
        apot_fx.convert_apot(model)
    prepared = apot_fx.prepare_apot(model)
    with pytest.raises(
        CalibrationError, match=r"stem \(its activation_post_process_0 never saw a finite value\)"
    ):
        apot_fx.convert_apot(prepared)
    apot_fx.calibrate(prepared, batches)
    with pytest.raises(ConfigError, match="Did you mean 'reference'"):
        apot_fx.convert_apot(prepared, backend="referense")  # type: ignore[arg-type]
    converted = apot_fx.convert_apot(prepared)
    with pytest.raises(StageError, match="is converted"):
        apot_fx.convert_apot(converted)
    prepared.apply(apot_fx.disable_fake_quant)
    with pytest.raises(StageError, match="switched off"):
        apot_fx.convert_apot(prepared)
    prepared.apply(apot_fx.enable_fake_quant)
    with torch.no_grad():
        prepared.get_submodule("left").weight[0] = float("inf")
    with pytest.raises(TensorError, match=r"left\.weight holds NaN or inf"):
        apot_fx.convert_apot(prepared, inplace=True)
    assert prepared.apot.kind == "prepared"


def test_convert_refuses_large_units_by_layer() -> None:
    model, batches = mlp()
    config = apot_fx.QConfig(apot_fx.WeightSpec(6, kind="pot"), apot_fx.ActivationSpec(4))
    prepared = calibrated(model, batches, config)
    with pytest.raises(LevelSetError, match=r"first\.weight_fake_quant"):
        apot_fx.convert_apot(prepared)


def test_load_refuses_bad_alpha_and_changes_nothing() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    for stage, key, value in (
        (prepared, "activation_post_process_1.alpha", float("nan")),
        (prepared, "left.weight_fake_quant.alpha", float("nan")),
        (converted, "quantize_1.alpha", float("nan")),
        (converted, "quantize_1.alpha", 2.0**41),
        (converted, "left.weight.alpha", 0.0),
    ):
        before, state = snapshot(stage), snapshot(stage)
        state["stem.weight.packed" if stage is converted else "stem.weight"].zero_()
        state[key].fill_(value)
        with pytest.raises(StateError, match=key.replace(".", r"\.")):
            stage.load_state_dict(state)
        assert same(before, snapshot(stage)), key


def test_an_alpha_outside_resumes_in_prepared() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    state = snapshot(prepared)
    state["activation_post_process_1.alpha"].fill_(-1.0)
    prepared.load_state_dict(state)
    assert prepared.activation_post_process_1.alpha == -1
    assert apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), batches).ok


def test_load_refuses_indices_beyond_the_set() -> None:
    model, batches = branches()
    converted = apot_fx.convert_apot(calibrated(model, batches))
    state = snapshot(converted)
    state["left.weight.packed"].fill_(255)  # index 15 of 15 levels
    with pytest.raises(StateError, match=r"left\.weight\.packed: holds index 15"):
        converted.load_state_dict(state)


def test_load_refuses_missing_and_unknown_keys() -> None:
    model, batches = branches()
    converted = apot_fx.convert_apot(calibrated(model, batches))
    before, state = snapshot(converted), snapshot(converted)
    state["left.weight.packd"] = state.pop("left.weight.packed")
    state["stem.weight.packed"].zero_()
    with pytest.raises(StateError, match=r"left\.weight\.pack"):
        converted.load_state_dict(state)
    assert same(before, snapshot(converted))
    with pytest.raises(StateError, match="shape"):
        converted.load_state_dict({**before, "left.s": torch.ones(3)})
    assert same(before, snapshot(converted))


def test_nothing_in_converted_is_called_after_fake_quants() -> None:
    model, batches = branches()
    converted = apot_fx.convert_apot(calibrated(model, batches))
    names = [f"{node.name} {node.target}" for node in converted.graph.nodes]
    assert not any("activation_post_process" in name for name in names)


def test_hooks_of_the_root_travel() -> None:
    model, batches = mlp()
    seen: list[int] = []
    model.register_forward_hook(lambda module, args, out: seen.append(1))
    prepared = calibrated(model, batches)
    seen.clear()
    prepared(batches[0])
    assert seen == [1]


def test_weight_only_needs_no_data() -> None:
    model, batches = mlp()
    prepared = apot_fx.prepare_apot(model, "w4")
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, batches).ok
    conv, images = branches()
    mapping = apot_fx.QConfigMapping.from_preset("w4").set_object_type(nn.Conv2d, "w4")
    prepared = apot_fx.prepare_apot(conv, mapping)
    verdict = apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), images)
    assert verdict.ok and len(verdict.train_form) == 4


def test_traced_models_prepare_too() -> None:
    model, batches = branches()
    traced = fx.symbolic_trace(model)
    prepared = calibrated(traced, batches)
    assert torch.equal(prepared(batches[0]), calibrated(model, batches)(batches[0]))


def test_calibrated_in_train_mode_learns() -> None:
    model, batches = mlp()
    prepared = apot_fx.prepare_apot(model.train())
    apot_fx.calibrate(prepared, batches)
    quant = prepared.activation_post_process_0
    assert prepared.training and quant.state == "frozen"
    prepared(batches[0]).sum().backward()
    assert quant.state == "learning" and quant.alpha.grad is not None


def test_a_class_inside_a_function_can_be_saved() -> None:
    class Local(nn.Sequential):
        pass

    model, x = Local(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3)
    converted = apot_fx.convert_apot(calibrated(model, [x]))
    other = pickle.loads(pickle.dumps(converted))
    assert torch.equal(other(x), converted(x))


def test_constants_of_the_trace_are_no_keys() -> None:
    class Constant(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * torch.tensor(2.0))

    model, x = seeded(Constant, (12,)), torch.randn(3, 12)
    prepared = calibrated(model, [x])
    prepared.load_state_dict(model.state_dict(), strict=True)
    converted = copy.deepcopy(apot_fx.convert_apot(prepared))
    assert torch.equal(converted(x), prepared(x))
    assert not any("constant" in key for key in converted.state_dict())


def test_layers_on_parts_of_a_packed_parameter_are_calibrated() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.linear(x, self.weight[:4], self.bias[:4])
            return nn.functional.linear(x, self.weight[4:], self.bias[4:])

    prepared = apot_fx.prepare_apot(Packed().eval(), "w4a4")
    batch = torch.randn(3, 4)
    apot_fx.calibrate(prepared, [batch], progress=False)
    converted = apot_fx.convert_apot(prepared)
    apot_fx.check_parity(prepared, converted, [batch]).raise_if_failed()
