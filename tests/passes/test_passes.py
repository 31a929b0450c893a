"""Each pass alone: what it changes, what it leaves and why, and that its invariants can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

import apot_fx
from apot_fx import ActivationSpec, QConfig, QConfigMapping, WeightSpec
from apot_fx.errors import GrammarError, TraceError
from apot_fx.nn import ConvertedOp, PreparedAdd, PreparedPool, Quantize
from apot_fx.passes import capture_passes, prepare_passes, run_passes
from apot_fx.passes.annotate import Annotate, plan_of
from apot_fx.passes.edges import index_edges
from apot_fx.passes.fold import FoldBatchNorm
from apot_fx.passes.functionalize import Functionalize
from apot_fx.passes.grammar import is_converted, is_hoisted, is_prepared
from apot_fx.passes.insert import Insert
from apot_fx.passes.normalize import Normalize
from apot_fx.passes.share import Share
from apot_fx.passes.stage import StageModule, info
from apot_fx.passes.trace import trace
from tests.nets import Branches, branches, calibrated, seeded

UNIFORM = QConfigMapping.of(QConfig(WeightSpec(4), ActivationSpec(4)))


class Fn(nn.Module):
    """A forward from a function, with a few layers at hand."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        self.a, self.b = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.c = nn.Conv2d(8, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.fn(self, x)


def prepared(fn: Callable[..., Any], config: Any = UNIFORM) -> StageModule:
    model, x = seeded(lambda: Fn(fn)), torch.randn(2, 4, 6, 6)
    return calibrated(model, [x], config)


def quants(stage: StageModule) -> int:
    return sum(isinstance(m, apot_fx.FakeQuantize) and m.observer is not None
               for m in stage.modules())  # fmt: skip


def calls(stage: StageModule, text: str) -> list[str]:
    return [node.name for node in stage.graph.nodes if text in str(node.target)]


# trace


def test_provenance_is_unique_and_says_where() -> None:
    stage = trace(seeded(Branches))
    numbers = [info(node).id for node in stage.graph.nodes]
    assert numbers == list(range(len(numbers)))
    assert any(info(node).origin.startswith("nets.py:") for node in stage.graph.nodes)


def test_unused_modules_stay() -> None:
    stage = trace(seeded(lambda: Fn(lambda self, x: self.a(x))))
    assert {"b.weight", "norm.running_mean"} <= set(stage.state_dict())


class Undecided(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_an_untraceable_submodule_becomes_a_leaf_with_a_reason() -> None:
    model = nn.Sequential(nn.Linear(3, 3), Undecided(), nn.Linear(3, 3))
    stage = trace(model)
    assert any(n.where == "1" and "test_passes.py" in n.what for n in stage.apot.reports[0].left)
    x = torch.randn(2, 3)
    assert torch.equal(stage(x), model(x))


def test_options_are_fixed_and_guarded() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, mask: Any = None, twice: bool = False) -> torch.Tensor:
            x = self.layer(x if mask is None else x * mask)
            return x * 2 if twice else x

    model, x = Masked(), torch.randn(2, 3)
    stage = trace(model)
    assert torch.equal(stage(x), model(x)) and torch.equal(stage(x, None, False), model(x))
    with pytest.raises(TraceError, match="'mask'"):
        stage(x, torch.ones(3))
    with pytest.raises(TraceError, match="'twice'"):
        stage(x, twice=True)
    given = trace(model, example_inputs=(x, torch.ones(3)))
    assert torch.equal(given(x, x), model(x, x))
    with pytest.raises(TraceError, match="don't fit"):
        trace(model, example_inputs={"y": x})


def test_iterating_over_parts() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        parts = [part.relu() for part in x.chunk(2, 1)]
        first, second = parts
        third = [part * 1 for part in x.split([1, 3], 1)]
        return self.c(torch.cat([second, first, *third], 1))

    stage = prepared(forward)
    x = torch.randn(2, 4, 6, 6)
    assert apot_fx.check_parity(stage, apot_fx.convert_apot(stage), [x]).ok


LOG: list[float] = []


def note(x: torch.Tensor) -> None:
    LOG.append(float(x.sum()))


torch.fx.wrap("note")


def test_dead_code_goes_but_users_effects_stay() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.a(x) + self.drop(x)  # nobody reads this
        note(x)
        return self.b(x)

    config = QConfig(WeightSpec(4), ActivationSpec(4, residual=8))
    stage = prepared(forward, config)
    assert not hasattr(stage.a, "weight_fake_quant") and hasattr(stage.b, "weight_fake_quant")
    LOG.clear()
    x = torch.randn(2, 4, 6, 6)
    converted = apot_fx.convert_apot(stage)
    converted(x)
    assert len(LOG) == 1
    assert apot_fx.check_parity(stage, converted, [x]).ok


# normalise


def test_functional_dropout_and_batch_norm_follow_the_mode() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = functional.dropout(x, 0.5, self.training)
        mean, var = self.norm.running_mean, self.norm.running_var
        return functional.batch_norm(x, mean, var, training=self.training)

    model = Fn(forward).eval()
    stage = run_passes(trace(model), [Functionalize(), Normalize()])
    x = torch.randn(8, 4, 3, 3)
    assert torch.equal(stage(x), model(x))
    stage.train()
    before = stage.norm.running_mean.clone()
    assert (stage(x) == stage(x)).float().mean() < 0.9
    assert not torch.equal(before, stage.norm.running_mean)


# annotate


def plans(fn: Callable[..., Any], mapping: Any) -> dict[str, Any]:
    stage = trace(seeded(lambda: Fn(fn)))
    run_passes(stage, [Functionalize(), Annotate(QConfigMapping.of(mapping))])
    return {str(n.target): plan_of(n) for n in stage.graph.nodes if n.op == "call_module"}


def test_first_and_last_layers() -> None:
    found = plans(lambda self, x: self.fc(self.b(self.a(x)).mean((2, 3))), "w4a4")
    assert found["a"].weight.kind == found["fc"].weight.kind == "uniform"
    assert found["b"].weight.kind == "apot"


def test_reasons() -> None:
    class Own(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Own(3, 3), nn.Bilinear(3, 3, 3), nn.Linear(3, 3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers[0](x)
            return self.layers[2](self.layers[1](x, x))

    stage = trace(Model())
    run_passes(stage, [Functionalize(), Annotate(UNIFORM)])
    why = {n.where: n.what for n in reversed(stage.apot.reports[-1].left)}
    assert "subclass of Linear" in why["layers.0"] and "no quantized form" in why["layers.1"]
    assert "layers.2" not in why


# fold


def folded(fn: Callable[..., Any]) -> StageModule:
    stage = trace(seeded(lambda: Fn(fn)))
    return run_passes(stage, [Functionalize(), Annotate(UNIFORM), FoldBatchNorm()])


def test_fold_and_its_reasons() -> None:
    assert folded(lambda self, x: self.norm(self.a(x))).apot.reports[-1].changed

    def two_readers(self: Any, x: torch.Tensor) -> Any:
        y = self.a(x)
        return self.norm(y) + y

    for fn, why in (
        (two_readers, "also read by"),
        (lambda self, x: self.norm(self.a(self.a(x))), "called 2 times"),
    ):
        report = folded(fn).apot.reports[-1]
        assert not report.changed and why in report.left[0].what


def test_batch_norm_without_statistics_or_affine() -> None:
    for options in ({"track_running_stats": False}, {"affine": False}):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), nn.ReLU())
        x = [torch.randn(4, 3, 6, 6)]
        stage = calibrated(seeded(lambda m=model: m), x)
        verdict = apot_fx.check_parity(stage, apot_fx.convert_apot(stage), x)
        assert verdict.ok
        assert bool(calls(apot_fx.convert_apot(stage), "1")) == ("track_running_stats" in options)


def test_linear_and_batch_norm_on_other_axes() -> None:
    """3-d input: Linear's channels are last, BatchNorm1d's on axis 1; only a run can tell."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(functional.relu(self.norm(self.first(x))))

    model, flat, deep = seeded(Sequence, (6,)), torch.randn(4, 6), torch.randn(4, 5, 6)
    for x in (flat, deep):
        stage = calibrated(model, [x])
        converted = apot_fx.convert_apot(stage)
        assert apot_fx.check_parity(stage, converted, [x]).ok
        assert bool(calls(converted, "norm")) == (x is deep)
        stage.apply(apot_fx.disable_fake_quant)
        assert torch.equal(stage(x), model(x))
    with pytest.raises(apot_fx.ApotError, match="calibrate with such input"):
        apot_fx.convert_apot(calibrated(model, [flat]))(deep)


# share


def test_one_module_per_root_and_spec() -> None:
    assert quants(prepared(lambda self, x: self.a(x) + self.b(x))) == 1
    assert quants(prepared(lambda self, x: self.a(x) + self.b(x.flip(1)))) == 1
    assert quants(prepared(lambda self, x: self.a(x) + self.b(x.relu()))) == 2
    cat = prepared(lambda self, x: self.c(torch.cat([x, x.relu() * 2], 1)) + self.a(x))
    assert quants(cat) == 1
    own = QConfigMapping.of(QConfig(WeightSpec(4), ActivationSpec(4))).set_module_name("b", "w8a8")
    assert quants(prepared(lambda self, x: self.a(x) + self.b(x), own)) == 2


def test_signedness_from_the_graph() -> None:
    stage = prepared(lambda self, x: self.a(functional.max_pool2d(x.sigmoid(), 2)))
    assert stage.activation_post_process_0.known_sign is False
    stage = prepared(lambda self, x: self.c(torch.cat([x.relu(), x], 1)))
    assert stage.activation_post_process_0.known_sign is None


# insert, hoist


def test_quantizers_stand_where_values_are_made() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(functional.max_pool2d(self.a(x), 2))
        return self.b(y.flip(1).reshape(y.size(0), 4, -1).reshape(y.shape))

    stage = prepared(forward)
    is_hoisted(stage)
    converted = apot_fx.convert_apot(stage)
    first = next(n for n in converted.graph.nodes if n.target == "a")
    assert len(first.args) == 2 and first.args[1][1] == 0.0  # one reader, relu absorbed
    assert not calls(converted, "relu")


def test_float_readers_get_the_raw_value() -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y = self.a(x).relu().flip(1)
        return self.b(y), y * 1.0

    stage = prepared(forward)
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        raw = functional.relu(apot_fx.convert_apot(stage).a(x.new_zeros(0, 4, 6, 6).byte()))
        assert raw.dtype == torch.float32
        values = stage(x)[1]
    assert len(values.unique()) > 20  # more than 16 levels


def test_dropout_is_passed_only_without_other_readers() -> None:
    alone = prepared(lambda self, x: self.a(self.drop(x).flip(1)))
    drop = next(n for n in alone.graph.nodes if n.target == "drop")
    assert "activation_post_process" in str(drop.args[0].target)

    def both(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.drop(x)
        return self.a(y.flip(1)) + y

    assert len(calls(prepared(both), "drop")) == 1


@pytest.mark.parametrize("clamped", [False, True])
def test_a_max_pool_with_a_float_reader_runs_once(clamped: bool) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = functional.max_pool2d(self.a(x), 3, 1, 1)
        y = y.relu().flip(1) if clamped else y
        return self.b(y) + y

    stage, x = prepared(forward), torch.randn(2, 4, 6, 6)
    converted = apot_fx.convert_apot(stage)
    for one in (stage, converted):
        assert sum(node.name.startswith("max_pool") for node in one.graph.nodes) == 1
    assert apot_fx.check_parity(stage, converted, [x]).ok


def test_grammar_can_fail() -> None:
    stage = trace(seeded(Branches))
    run_passes(stage, (*capture_passes(), *prepare_passes(UNIFORM)))
    node = next(n for n in stage.graph.nodes if n.target == "join")
    node.args = (node.args[0].args[0][0], *node.args[1:])
    other = next(n for n in stage.graph.nodes if n.op == "placeholder")
    node.args = (other, *node.args[1:])
    with pytest.raises(GrammarError, match="join"):
        is_prepared(stage)
    with pytest.raises(GrammarError, match="left after convert"):
        is_converted(stage)
    model, batches = branches()
    converted = apot_fx.convert_apot(calibrated(model, batches))
    twice = [n for n in converted.graph.nodes if info(n).id is not None][:2]
    twice[1].meta["apot"] = info(twice[0])
    with pytest.raises(GrammarError, match="already"):
        is_converted(converted)


def test_insert_needs_finite_weights_by_name() -> None:
    model = seeded(Branches)
    with torch.no_grad():
        model.get_submodule("join").weight[0] = float("nan")
    stage = trace(model)
    run_passes(stage, [Functionalize(), Annotate(UNIFORM), Share()])
    with pytest.raises(apot_fx.ApotError, match=r"join\.weight"):
        run_passes(stage, [Insert()])


# convert


@pytest.mark.parametrize("fn", [
    lambda self, x: self.b(functional.adaptive_max_pool2d(self.a(x), 3)),
    lambda self, x: self.b(functional.pad(self.a(x), (1, 0, 2, 1))),
    lambda self, x: self.b(functional.pad(self.a(x), (1, 1, 1, 1), "reflect")),
    lambda self, x: self.b(functional.interpolate(self.a(x), scale_factor=2)),
    lambda self, x: self.b(functional.pixel_shuffle(torch.cat([self.a(x)] * 4, 1), 2)),
    lambda self, x: self.b(self.a(x).permute(0, 1, 3, 2).roll(1, 2)),
    lambda self, x: self.b(self.a(x).index_select(1, torch.tensor([3, 1, 0, 2]))),
    lambda self, x: self.b(torch.stack([self.a(x), self.a(x)], 2).flatten(2, 3)),
    lambda self, x: self.b(self.a(x)[:, :, 1:].expand(2, 4, 5, 6)),
    lambda self, x: self.b(torch.cat(self.a(x).split(1, 1), 1)),
    lambda self, x: self.b(functional.max_pool2d(self.a(x), 2).clamp(min=0.5)),
    lambda self, x: self.b(nn.functional.hardtanh(self.a(x), -0.3, 0.2).unsqueeze(0).squeeze(0)),
])  # fmt: skip
@pytest.mark.parametrize("bits", [4, 8])
def test_index_ops_carry_indices(fn: Callable[..., Any], bits: int) -> None:
    config = QConfig(WeightSpec(4), ActivationSpec(4))
    if bits == 8:  # more than 256 levels: int16 indices
        config = QConfig(WeightSpec(4), ActivationSpec(9, signed=True))
    stage = prepared(fn, config)
    converted = apot_fx.convert_apot(stage)
    x = torch.randn(2, 4, 6, 6)
    assert apot_fx.check_parity(stage, converted, [x]).ok
    standing = [
        n
        for n in converted.graph.nodes
        if n.op == "call_module" and isinstance(converted.get_submodule(str(n.target)), Quantize)
    ]
    assert len(standing) == 1  # the input's; all others live in the layers


def test_residual_adds_and_pools_on_indices() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.a(x)) + x
        y = functional.avg_pool2d(self.b(y), 3, 2, 1)
        return self.fc(functional.adaptive_avg_pool2d(y, 1).flatten(1))

    config = QConfig(WeightSpec(4), ActivationSpec(4, residual=8))
    stage = prepared(forward, config)
    assert sum(isinstance(m, (PreparedAdd, PreparedPool)) for m in stage.modules()) == 3
    converted = apot_fx.convert_apot(stage)
    assert apot_fx.check_parity(stage, converted, [torch.randn(2, 4, 6, 6)]).ok
    seen: list[torch.dtype] = []

    class Kinds(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_module" and n.target != "fc":
                seen.append(value.dtype)
            return value

    Kinds(converted).run(torch.randn(2, 4, 6, 6))
    assert set(seen) == {torch.uint8}  # integers from the input's quantizer to the head
    assert sum(isinstance(m, ConvertedOp) for m in converted.modules()) == 6


def test_batch_norm_behind_a_residual_add_runs_on_indices() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.norm(self.a(x) + x))

    config = QConfig(WeightSpec(4), ActivationSpec(4, residual=8))
    stage = prepared(forward, config)
    assert any(node.target == "apot_norm_0" for node in stage.graph.nodes)
    assert "norm.running_mean" in stage.state_dict()
    converted = apot_fx.convert_apot(stage)
    verdict = apot_fx.check_parity(stage, converted, [torch.randn(2, 4, 6, 6)])
    assert verdict.ok
    assert index_edges(stage) == (2, 2)
