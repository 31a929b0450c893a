"""Exported modules prepare as the model that was exported: same names, same α, same indices."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import fx, nn

import apot_fx
from apot_fx import ActivationSpec, QConfig, QConfigMapping, WeightSpec
from apot_fx.fake_quant import FakeQuantize
from apot_fx.passes.aten_twins import runs_same, twin_of
from apot_fx.passes.example import Call
from apot_fx.passes.exported import rebuild
from apot_fx.passes.operators import base_name, operator_of
from apot_fx.pipeline.floats import in_float, outputs
from apot_fx.values import same_bits, tensors_in

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
_BATCH = torch.export.Dim("batch")


class Block(nn.Module):
    """One ReLU module used twice."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Block(4), Block(4))
        self.pool, self.avg = nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer1(self.pool(functional.relu_(self.stem(x))))
        return self.fc(self.drop(torch.flatten(self.avg(x), 1)))


def mlp() -> nn.Module:
    torch.manual_seed(1)
    layers = (nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Dropout(0.3), nn.Linear(8, 4))
    return nn.Sequential(*layers, nn.Softmax(-1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.up, self.norm = nn.ConvTranspose2d(4, 6, 2, 2), nn.GroupNorm(2, 6)
        self.act, self.mix = nn.PReLU(), nn.Conv2d(6, 4, 1)
        self.weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
        self.last = nn.Parameter(torch.randn(2, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.up(functional.relu(self.conv(x), inplace=True))))
        x = functional.relu6(self.weighted(functional.hardtanh(self.mix(x))))
        return functional.conv2d(x, self.last)


class Tied(nn.Module):
    """An embedding and a head with one weight; slices, repeats and sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.norm, self.fc = nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids: torch.Tensor) -> dict[str, Any]:
        x = self.norm(self.emb(ids))
        x = x.view(x.size(0), -1, 8)[:, 1:, ::2].repeat(1, 1, 2)
        x = functional.gelu(self.fc(x))
        return {"logits": self.head(x), "rest": [x.new_zeros(x.size(0) * 2)]}


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.last = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        self.alias = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.relu(self.alias(self.relu(self.first(x)))))


class Writes(nn.Module):
    """In-place ops, tensors made of numbers, an assert."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = torch.zeros_like(x)
        parts[:, 0] = x[:, 1]
        parts[:, [1, 2]] += 1
        y = self.last(functional.relu(self.fc(parts)))
        y += x + torch.tensor([1.0, 2.0, 3.0, 4.0])
        assert y.shape[1] == 4
        pooled = functional.adaptive_max_pool1d(y[None], 1)
        return y.masked_fill_(y > 0, 1.0).to(torch.float64), pooled


@dataclasses.dataclass
class Pair:
    left: torch.Tensor
    right: torch.Tensor


torch.export.register_dataclass(Pair)


class Structured(nn.Module):
    """Dataclasses and dicts in and out, variadic and keyword arguments, an option."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.constant = torch.randn(4)

    def forward(
        self, pair: Pair, *args: torch.Tensor, scale: float = 2.0, **kwargs: Any
    ) -> tuple[Pair, dict[str, torch.Tensor]]:
        x = self.fc(torch.relu(pair.left)) * scale + self.constant
        return Pair(x, pair.right + args[0]), {"z": kwargs["more"]["z"] + 1}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6, 2, batch_first=True, dropout=0.2)
        self.lstm, self.last = nn.LSTM(6, 5, bidirectional=True), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, _ = self.gru(x)
        y, (_, cell) = self.lstm(y.transpose(0, 1))
        return self.last(y), cell


class NoGradPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fixed, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = torch.relu(self.fixed(x))
        return self.last(x)


def _image() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16)


def _mask() -> torch.Tensor:
    return torch.ones(3, 3, dtype=torch.bool).tril()


_STRUCTURED = Call(
    (Pair(torch.randn(2, 4), torch.randn(2)), torch.randn(2)),
    {"scale": 3.0, "more": {"z": torch.randn(2)}},
)
_CASES: dict[str, tuple[Any, Call]] = {
    "resnet": (ResNet, Call((_image(),), {})),
    "mlp": (mlp, Call((torch.randn(2, 3, 4),), {})),
    "attention": (Attention, Call((torch.randn(2, 3, 8),), {"mask": _mask()})),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        Call((torch.randn(2, 3, 8),), {}),
    ),
    "decoder": (Decoder, Call((torch.randn(2, 3, 5, 5),), {})),
    "recurrent": (Recurrent, Call((torch.randn(2, 3, 4),), {})),
    "tied": (Tied, Call((torch.randint(0, 10, (3, 4)),), {})),
    "shared": (Shared, Call((torch.randn(2, 8),), {})),
    "writes": (Writes, Call((torch.randn(2, 4),), {})),
    "structured": (Structured, _STRUCTURED),
}


def _model(make: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def _export(model: nn.Module, call: Call, dynamic: Any = None) -> fx.GraphModule:
    program = torch.export.export(model, call.args, call.kwargs, dynamic_shapes=dynamic)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def _forward(model: nn.Module, call: Call) -> Any:
    own = call.copied()
    return model(*own.args, **own.kwargs)


def _quants(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: m.alpha for n, m in model.named_modules() if isinstance(m, FakeQuantize)}


def _both_stages(model: nn.Module, config: Any, *calls: Call) -> tuple[nn.Module, nn.Module]:
    """Prepared and converted, with parity."""
    prepared = apot_fx.prepare_apot(model, config, calls[0])
    apot_fx.calibrate(prepared, calls, forward=_forward, progress=False)
    converted = apot_fx.convert_apot(prepared)
    apot_fx.check_parity(prepared, converted, calls, forward=_forward).raise_if_failed()
    return prepared, converted


@functools.cache
def _stages_of(name: str) -> tuple[nn.Module, nn.Module]:
    """Prepared and converted of a case's export; not to be changed."""
    make, call = _CASES[name]
    return _both_stages(_export(_model(make), call), "w4a4", call)


def _assert_alike(model: nn.Module, exported: nn.Module, config: Any, *calls: Call) -> nn.Module:
    """An exported module prepares as its model: names, α, outputs, checkpoint; gives prepared."""
    prepared, converted = _both_stages(exported, config, *calls)
    direct, direct_converted = _both_stages(model, config, *calls)
    mine, theirs = _quants(prepared), _quants(direct)
    assert mine.keys() == theirs.keys() and mine
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    for call in calls:
        assert same_bits(outputs(converted, call), outputs(direct_converted, call))
    prepared.load_state_dict(model.state_dict(), strict=True)
    return prepared


@pytest.mark.parametrize("name", _CASES)
def test_an_exported_module_prepares_as_its_model(name: str) -> None:
    make, call = _CASES[name]
    model = _model(make)
    exported = _export(model, call)
    prepared = _assert_alike(model, exported, "w4a4", call)
    assert not prepared.training
    with in_float(prepared), torch.no_grad():
        assert same_bits(outputs(prepared, call), _forward(exported, call))


@pytest.mark.parametrize("name", ["resnet", "mlp", "shared"])
def test_decomposed_programs_prepare_too(name: str) -> None:
    make, call = _CASES[name]
    model = _model(make)
    program = torch.export.export(model, call.args, call.kwargs).run_decompositions()
    _assert_alike(model, program.module(), "w4a4", call)


@pytest.mark.parametrize("name", _CASES)
def test_stages_of_exported_modules_copy_and_pickle(name: str) -> None:
    _, call = _CASES[name]
    for stage in _stages_of(name):
        expected = outputs(stage, call)
        assert same_bits(expected, outputs(copy.deepcopy(stage), call))
        assert same_bits(expected, outputs(pickle.loads(pickle.dumps(stage)), call))


@pytest.mark.parametrize("name", _CASES)
def test_training_reaches_every_parameter(name: str) -> None:
    _, call = _CASES[name]
    prepared = copy.deepcopy(_stages_of(name)[0])
    results = _forward(prepared.train(), call)
    floats = [t for t in tensors_in(results) if t.is_floating_point() and t.requires_grad]
    sum(t.float().sum() for t in floats).backward()  # type: ignore[union-attr]
    assert [n for n, p in prepared.named_parameters() if p.grad is None] == []


def test_batch_norm_and_dropout_live_again() -> None:
    _, call = _CASES["resnet"]
    prepared = copy.deepcopy(_stages_of("resnet")[0])
    norm = prepared.get_submodule("layer1.0.bn1")
    assert isinstance(norm, nn.BatchNorm2d) and isinstance(prepared.drop, nn.Dropout)
    before, count = norm.running_mean.clone(), int(norm.num_batches_tracked)
    _forward(prepared.train(), call)
    assert not torch.equal(before, norm.running_mean)
    assert int(norm.num_batches_tracked) == count + 1
    assert not torch.equal(_forward(prepared, call), _forward(prepared, call))
    prepared.eval()
    assert torch.equal(_forward(prepared, call), _forward(prepared, call))


def test_exported_in_train_mode() -> None:
    make, call = _CASES["resnet"]
    model = _model(make).train()
    before = copy.deepcopy(model.state_dict())
    exported = _export(model, call)
    prepared = _assert_alike(model.eval(), exported, "w4a4", call)
    assert not prepared.training and isinstance(prepared.drop, nn.Dropout)
    assert all(torch.equal(before[k], v) for k, v in exported.state_dict().items())


def test_other_batch_sizes_of_a_dynamic_export() -> None:
    for name, other in (
        ("resnet", torch.randn(7, 3, 16, 16)),
        ("tied", torch.randint(0, 10, (5, 4))),
    ):
        make, call = _CASES[name]
        model = _model(make)
        exported = _export(model, call, ({0: _BATCH},))
        _assert_alike(model, exported, "w4a4", call, Call((other,), {}))


@pytest.mark.parametrize("config", ["w4", "residual", "products", "by_name"])
def test_configs_find_the_same_layers(config: str) -> None:
    made: dict[str, Any] = {
        "w4": "w4",
        "residual": QConfig(WeightSpec(4), ActivationSpec(4, residual=8)),
        "products": QConfig(WeightSpec(4), ActivationSpec(4, products=8)),
        "by_name": QConfigMapping.from_preset("w4a4")
        .set_module_name("layer1.0.conv1", "w8a8")
        .set_object_type(nn.Linear, None),
    }
    make, call = _CASES[{"products": "attention", "w4": "mlp"}.get(config, "resnet")]
    model = _model(make)
    _assert_alike(model, _export(model, call), made[config], call)


def test_the_exported_module_is_left_as_it_was() -> None:
    make, call = _CASES["resnet"]
    exported = _export(_model(make), call)
    before = _forward(exported, call)
    state = copy.deepcopy(exported.state_dict())
    _forward(apot_fx.prepare_apot(exported, "w4a4", call).train(), call).sum().backward()
    assert torch.equal(before, _forward(exported, call))
    assert all(torch.equal(state[k], v) for k, v in exported.state_dict().items())
    assert all(p.grad is None for p in exported.parameters())
    taken = apot_fx.prepare_apot(exported, "w4a4", call, inplace=True)
    assert taken.fc.weight is exported.fc.weight


def test_without_example_inputs() -> None:
    make, call = _CASES["resnet"]
    prepared = apot_fx.prepare_apot(_export(_model(make), call))
    apot_fx.calibrate(prepared, [call.args[0]], progress=False)
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, [call.args[0]]).ok
    rows = str(apot_fx.explain(converted)) + str(apot_fx.summary(converted))
    assert "layer1.1.conv2" in rows


def test_an_exported_module_inside_of_a_model() -> None:
    class Outer(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body, self.head = body, nn.Linear(5, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.body(x)))

    make, call = _CASES["resnet"]
    outer = Outer(_export(_model(make), call))
    prepared, _ = _both_stages(outer, "w4a4", call)
    assert "body.layer1.0.conv1.weight_fake_quant" in _quants(prepared)
    assert "head.weight_fake_quant" in _quants(prepared)
    assert outer.state_dict().keys() <= prepared.state_dict().keys()


def test_a_region_without_gradients_is_quantized_and_stays_without() -> None:
    call = Call((torch.randn(2, 4),), {})
    prepared, _ = _both_stages(_export(_model(NoGradPart), call), "w4a4", call)
    assert "fixed.weight_fake_quant" in _quants(prepared)
    _forward(prepared.train(), call).sum().backward()
    assert prepared.fixed.weight.grad is None and prepared.last.weight.grad is not None


def test_options_are_guarded() -> None:
    make, call = _CASES["structured"]
    prepared = apot_fx.prepare_apot(_export(_model(make), call), "w4a4", call)
    with pytest.raises(apot_fx.ApotError, match=r"'scale' was exported as 3\.0 and is 4\.0"):
        _forward(prepared, Call(call.args, {**call.kwargs, "scale": 4.0}))


def test_an_operator_that_writes_twice_stays_and_pins_what_it_writes() -> None:
    @torch.library.custom_op("apot_tests::bump", mutates_args=("x", "y"))
    def bump(x: torch.Tensor, y: torch.Tensor) -> None:
        x.add_(1)
        y.mul_(2)

    class Bumps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            one, two = self.one(x) + 1, self.two(x) + 1
            bump(one, two)
            return self.last(one + two), one, two

    call = Call((torch.randn(2, 4),), {})
    model = _model(Bumps)
    exported = _export(model, call)
    prepared, converted = _both_stages(exported, "w4a4", call)
    with in_float(prepared), torch.no_grad():
        assert same_bits(outputs(prepared, call), _forward(model, call))
    assert same_bits(outputs(prepared, call), outputs(converted, call))


def test_every_operator_of_these_models_has_a_twin() -> None:
    left = set()
    for make, call in _CASES.values():
        for node in rebuild(_export(_model(make), call)).graph.nodes:
            called = operator_of(node)
            if called is not None:
                left.add(base_name(called))
    assert left == {"index_put_"}  # of Writes: an index that torch's function does not take


def test_a_twin_must_run_the_same_operators() -> None:
    make, call = _CASES["mlp"]
    nodes = _export(_model(make), call).graph.nodes
    (node,) = (n for n in nodes if str(n.target) == "aten.gelu.default")
    twin = twin_of(node, False)
    assert twin is not None and twin.target is functional.gelu
    assert not runs_same(node, dataclasses.replace(twin, target=torch.relu))
    assert not runs_same(node, dataclasses.replace(twin, kwargs={"approximate": "tanh"}))
    node.args[0].meta.pop("val")
    assert twin_of(node, False) is None


def test_graph_modules_prepare() -> None:
    make, call = _CASES["resnet"]
    model = _model(make)
    traced = torch.fx.symbolic_trace(model)
    next(iter(traced.graph.nodes)).meta["own"] = 1
    _assert_alike(model, traced, "w4a4", call)


def test_what_is_no_python_module_is_refused_with_the_remedy() -> None:
    make, call = _CASES["mlp"]
    model = _model(make)
    with pytest.raises(apot_fx.ApotError, match=r"ExportedProgram; pass program.module\(\)"):
        apot_fx.prepare_apot(torch.export.export(model, call.args))  # type: ignore[arg-type]
    with pytest.raises(apot_fx.ApotError, match="pass the model that was scripted or traced"):
        apot_fx.prepare_apot(torch.jit.script(nn.Linear(2, 2)))
    unflattened = torch.export.unflatten(torch.export.export(model, call.args))
    with pytest.raises(apot_fx.ApotError, match="no unflattened export"):
        apot_fx.prepare_apot(unflattened)
    with pytest.warns(UserWarning, match="inside of torch.compile's module is prepared"):
        prepared = apot_fx.prepare_apot(torch.compile(model))
    assert model.state_dict().keys() <= prepared.state_dict().keys()


def test_a_compiled_part_of_a_model_is_quantized() -> None:
    """It used to run its original layers beside the quantized ones."""
    outer = nn.Sequential(nn.Linear(8, 8), torch.compile(Shared()))
    call = Call((torch.randn(2, 8),), {})
    for given in (call, None):
        prepared = apot_fx.prepare_apot(outer, "w4a4", given)
        apot_fx.calibrate(prepared, [call.args[0]], progress=False)
        converted = apot_fx.convert_apot(prepared)
        assert apot_fx.check_parity(prepared, converted, [call.args[0]]).ok
        assert "1._orig_mod.last.weight_fake_quant" in _quants(prepared)
    assert outer.state_dict().keys() <= prepared.state_dict().keys()


def test_example_inputs_that_the_export_refuses() -> None:
    make, call = _CASES["mlp"]
    exported = _export(_model(make), call)
    with pytest.raises(apot_fx.ApotError, match="own forward fails on example_inputs"):
        apot_fx.prepare_apot(exported, "w4a4", torch.randn(5, 3, 4))
