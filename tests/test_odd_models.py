"""Code that tracing tempts to get wrong: right bits, or an error that says what changed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torch.nn.utils import prune

import apot_fx
from apot_fx.errors import ApotError, CalibrationError, GuardError
from apot_fx.values import same_bits


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)


@dataclasses.dataclass
class Given:
    x: torch.Tensor
    double: bool = False
    gain: torch.Tensor | None = None


X = torch.linspace(-1, 1, 32).reshape(4, 8)


def model_of(forward: Callable[..., Any], **children: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model = type("Odd", (Base,), {"forward": forward})()
    for name, child in children.items():
        model.add_module(name, child)
    return model.eval()


def check(model: nn.Module, batches: list[Any], with_example: bool) -> nn.Module:
    """The whole way; the prepared model."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        example = batches[0] if with_example else None
        prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=example)
        apot_fx.calibrate(prepared, batches, progress=False)
        converted = apot_fx.convert_apot(prepared)
        verdict = apot_fx.check_parity(prepared, converted, batches)
        assert verdict.ok, verdict
        copy.deepcopy(prepared)
        with torch.no_grad():
            for batch in batches:
                assert same_bits(prepared(*batch), converted(*batch))
            prepared.apply(apot_fx.disable_fake_quant)
            for batch in batches:
                assert same_bits(prepared(*batch), model(*batch))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return prepared


def list_in(self: Any, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [self.b(torch.relu(self.a(x))) for x in xs]


def member(self: Any, d: dict[str, torch.Tensor]) -> torch.Tensor:
    y = self.b(torch.relu(self.a(d["x"])))
    return y * d["gain"] if "gain" in d else y


def values_in(self: Any, d: dict[str, torch.Tensor]) -> torch.Tensor:
    return self.b(torch.relu(sum(self.a(x) for x in d.values())))


def fields(self: Any, d: Given) -> torch.Tensor:
    y = self.b(torch.relu(self.a(d.x)))
    y = y * 2 if d.double else y
    return y if d.gain is None else y * d.gain


GAIN = torch.tensor(2.0)
#: A forward, a first input, and one by which the model does something else.
STRUCTURES: dict[str, tuple[Callable[..., Any], Any, Any]] = {
    "length": (list_in, [X, X], [X, X, X]),
    "shorter": (list_in, [X, X], [X]),
    "membership": (member, {"x": X}, {"x": X, "gain": GAIN}),
    "missing": (member, {"x": X, "gain": GAIN}, {"x": X}),
    "keys": (values_in, {"p": X}, {"p": X, "q": X}),
    "bool": (fields, Given(X), Given(X, double=True)),
    "None": (fields, Given(X), Given(X, gain=GAIN)),
    "not None": (fields, Given(X, gain=GAIN), Given(X)),
}


@pytest.mark.parametrize("case", STRUCTURES)
def test_structure_of_an_example_is_guarded(case: str) -> None:
    forward, first, other = STRUCTURES[case]
    model = model_of(forward)
    check(model, [(first,)], with_example=True)
    prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=(first,))
    with pytest.raises(GuardError, match="example_inputs"):
        prepared(other)
    check(model, [(first,), (other,)], with_example=False)  # then it is asked every time


def test_an_optional_argument_that_the_example_gave() -> None:
    def forward(self: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.b(torch.relu(self.a(x)))
        return y if mask is None else y * mask[:, :3]

    model = model_of(forward)
    prepared = check(model, [(X, X + 1)], with_example=True)  # a tuple passes both
    with pytest.raises(GuardError, match="'mask' was given"):
        prepared(X)


def swallows(self: Any, x: torch.Tensor) -> torch.Tensor:
    with contextlib.suppress(Exception):
        if x.sum() > 0:
            return self.b(self.a(x))
    return self.b(torch.relu(self.a(x)))


def tuple_slice(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.b(torch.cat(self.a(x).chunk(4, -1)[1:], -1).repeat(1, 2)[:, :8])


def unwritten(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(self.a(x))
    z = y.new_empty(y.shape[0], 8)
    z[..., :4].copy_(y[:, 4:])
    z[..., 4:] = y[:, :4]
    return self.b(z)


def swapped(self: Any, x: torch.Tensor) -> torch.Tensor:
    weights = {name: value * 2 for name, value in self.a.named_parameters()}
    return self.b(torch.relu(torch.func.functional_call(self.a, weights, (x,))))


def by_method(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.b(self.choose(torch.relu(self.a(x))))


class Puts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        state["h"] = self.layer(x)


def writes_into_dict(self: Any, x: torch.Tensor) -> torch.Tensor:
    state: dict[str, torch.Tensor] = {}
    self.puts(self.a(x), state)
    return self.b(torch.relu(state["h"])) if x.sum() < 1e9 else x


def cells(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = c = torch.zeros(len(x), 8)
    for step in range(x.size(1) // 4):
        h, c = self.cell(self.a(x) + step, (h, c))
    return self.b(h)


def attends(self: Any, x: torch.Tensor) -> torch.Tensor:
    if x.sum() > 1e9:
        return x
    y = self.a(x).unsqueeze(0)
    assert isinstance(self.attend, nn.MultiheadAttention)
    return self.b(self.attend(y, y, y)[0])


def weight_on_the_left(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.relu(self.a.weight @ self.a(x).mT)
    return self.b((torch.matmul(self.a.weight, y.unsqueeze(0)) + self.a.bias[:, None]).mT)


def geometry_of_shapes(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x).unsqueeze(-1).expand(-1, -1, 5)
    channels, width = self.conv.weight.shape[0], self.conv.weight.shape[-1]
    assert channels == 8
    y = functional.conv1d(y, self.conv.weight, padding=width - 1, groups=y.shape[1])
    return self.b(torch.relu(y).mT)


def probed(self: Any, x: torch.Tensor) -> torch.Tensor:
    """torch asks whether a size is a number; nobody's except clause catches our refusal."""
    channels = x.unsqueeze(-1).shape[1]
    return self.b(
        functional.conv1d(self.a(x).unsqueeze(-1), self.conv.weight, groups=channels)[:, :, 0]
    )


def depthwise() -> nn.Module:
    return nn.Conv1d(8, 8, 1, groups=8)


CODE: dict[str, Callable[[], nn.Module]] = {
    "swallows": lambda: model_of(swallows),
    "tuple slice": lambda: model_of(tuple_slice),
    "unwritten memory": lambda: model_of(unwritten),
    "functional_call": lambda: model_of(swapped),
    "dict argument": lambda: model_of(writes_into_dict, puts=Puts()),
    "cells": lambda: model_of(cells, cell=nn.LSTMCell(8, 8)),
    "weight on the left": lambda: model_of(weight_on_the_left),
    "geometry of shapes": lambda: model_of(geometry_of_shapes, conv=depthwise()),
    "probed": lambda: model_of(probed, conv=depthwise()),
    "scripted part": lambda: nn.Sequential(
        nn.Linear(8, 8),
        torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())),
        nn.Linear(8, 3),
    ).eval(),
}


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("case", CODE)
def test_odd_code(case: str, with_example: bool) -> None:
    check(CODE[case](), [(X,), (-X,), (X[:2],)], with_example)


@pytest.mark.parametrize("with_example", [False, True])
def test_a_method_with_a_decision_pickles(with_example: bool) -> None:
    model = MethodModel().eval()
    prepared = check(model, [(X,), (-X,)], with_example)
    assert same_bits(pickle.loads(pickle.dumps(prepared))(X), prepared(X))


class MethodModel(Base):
    def choose(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if float(x.mean()) > 0.2 else x

    forward = by_method


def test_attention_that_python_calls() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    prepared = check(model_of(attends, attend=attention), [(X,), (X[:3],)], with_example=True)
    layers = [row["name"] for row in apot_fx.explain(prepared).rows if row["form"] == "quantized"]
    assert {"attend.in_proj", "attend.out_proj"} <= set(layers)


def test_a_pruned_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    prune.l1_unstructured(model[0], "weight", 0.5)
    check(model, [(X,)], with_example=False)


def test_forward_replaced_on_a_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    plain = model[0].forward
    model[0].forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    prepared = check(model, [(X,)], with_example=True)
    assert "replaced on the instance" in str(apot_fx.explain(prepared))


class Calls(Base):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) * 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x)))


def test_call_of_its_own() -> None:
    check(Calls().eval(), [(X,)], with_example=False)


class Counts(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(8))
        self.calls, self.history = 0, [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.history.append(1)
        h = torch.relu(self.a(x))
        self.seen.lerp_(h.mean(0), 0.1)
        return self.b(h + self.seen)


def test_prepare_and_parity_leave_a_models_own_state() -> None:
    model = Counts().eval()
    prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=X)
    for one in (model, prepared):
        assert (one.calls, one.history) == (0, [0]) and not one.seen.any()
    apot_fx.calibrate(prepared, [X], progress=False)
    before = prepared.seen.clone()
    assert apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [X]).ok
    assert torch.equal(before, prepared.seen) and prepared.seen.is_leaf


@pytest.mark.parametrize("with_attention", [False, True])
def test_a_failed_inplace_prepare_changes_nothing(with_attention: bool) -> None:
    layers: list[nn.Module] = [nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    if with_attention:
        layers.insert(1, nn.TransformerEncoderLayer(8, 2, 16))
    model = nn.Sequential(*layers).eval()
    kinds, keys = [type(m) for m in model.modules()], list(model.state_dict())
    wrong = apot_fx.QConfigMapping.from_preset("w4a4").set_module_name("no_such_layer", None)
    with pytest.raises(ApotError, match="no_such_layer"):
        apot_fx.prepare_apot(model, wrong, inplace=True)
    assert kinds == [type(m) for m in model.modules()] and keys == list(model.state_dict())
    apot_fx.prepare_apot(model, "w4a4", inplace=True)


def test_explain_names_decisions_on_the_mode() -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y = torch.relu(self.a(x))
        return self.b(y) if self.training else (self.b(y), y)

    prepared = apot_fx.prepare_apot(model_of(forward), "w4a4")
    assert "`if self.training` decided once" in str(apot_fx.explain(prepared))


def test_a_stage_is_still_of_its_class() -> None:
    class Asks(Base):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e9:
                return x
            assert isinstance(self.block, Block)
            return self.b(self.block(self.a(x)))

    prepared = check(Asks().eval(), [(X,)], with_example=True)
    assert isinstance(prepared.block, torch.fx.GraphModule) and isinstance(prepared.block, Block)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + x


def test_batches_of_nothing() -> None:
    prepared = apot_fx.prepare_apot(model_of(list_in), "w4a4")
    with pytest.raises(CalibrationError):
        apot_fx.calibrate(prepared, [], progress=False)


def test_a_layer_without_outputs() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 0)).eval()
    prepared = apot_fx.prepare_apot(model, "w4a4")
    apot_fx.calibrate(prepared, [X], progress=False)
    converted = apot_fx.convert_apot(prepared)
    assert prepared(X).shape == converted(X).shape == (4, 0)
    assert apot_fx.check_parity(prepared, converted, [X]).uncovered == ["2"]


@pytest.mark.parametrize(
    ("case", "layers"), [("weight on the left", 4), ("geometry of shapes", 3), ("probed", 3)]
)
def test_layers_of_odd_code_are_quantized(case: str, layers: int) -> None:
    prepared = check(CODE[case](), [(X,)], with_example=True)
    rows = apot_fx.explain(prepared).rows
    assert sum(row["form"] == "quantized" for row in rows) == layers, rows


class Picky(Base):
    """Sizes decide, and a weight is read: rather a guard than a layer in float."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, self.a.weight)
        return y * 2 if x.shape[0] > 2 else y


class Decides(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) if float(x.sum()) > 0 else -self.a(x))


def test_sizes_that_a_guard_refuses_do_not_fail_prepare() -> None:
    model = nn.Sequential(Picky(), nn.ReLU(), Decides()).eval()
    prepared = check(model, [(X,), (-X,)], with_example=True)
    with pytest.raises(GuardError):
        prepared(X[:1])


@pytest.mark.parametrize("with_example", [False, True])
def test_prepare_in_train_does_not_advance_a_parametrization(with_example: bool) -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.ReLU())
    before = {name: value.clone() for name, value in model.train().state_dict().items()}
    prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=X if with_example else None)
    state = prepared.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())


def test_calibration_of_nan_alone_is_refused() -> None:
    prepared = apot_fx.prepare_apot(model_of(list_in), "w4a4", example_inputs=([X],))
    for nothing in (X * float("nan"), X[:0]):
        with pytest.raises(CalibrationError, match="no quantizer saw a finite value"):
            apot_fx.calibrate(prepared, [([nothing],)], progress=False)


def test_parity_does_not_compare_unwritten_memory() -> None:
    prepared = apot_fx.prepare_apot(model_of(unwritten), "w4a4", example_inputs=X)
    apot_fx.calibrate(prepared, [X], progress=False)
    assert isinstance(prepared, torch.fx.GraphModule)
    empty = next(node for node in prepared.graph.nodes if node.target == "new_empty")
    view = next(user for user in empty.users if user.target is operator.getitem)
    verdict = apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [X])
    assert {empty.name, view.name}.isdisjoint(found.where for found in verdict.nodes)


def updates_a_twin(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        for mine, twin in zip(self.a.parameters(), self.twin.parameters(), strict=True):
            (twin.data if self.through_data else twin).mul_(0.9).add_(mine, alpha=0.1)
    return self.b(self.a(x) - self.twin(x))


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("through_data", [False, True])
def test_parameters_that_a_forward_writes_are_put_back(
    with_example: bool, through_data: bool
) -> None:
    model = model_of(updates_a_twin, twin=nn.Linear(8, 8))
    model.through_data = through_data  # type: ignore[assignment]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=X if with_example else None)
    state = prepared.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value) and torch.equal(before[name], state[name])
    prepared.apply(apot_fx.disable_observer).apply(apot_fx.disable_fake_quant)
    with torch.no_grad():
        assert all(torch.equal(prepared(X), model(X)) for _ in range(3))


@pytest.mark.parametrize("with_example", [False, True])
def test_attention_with_dropout_prepared_in_train(with_example: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 5, 8)
    model = nn.TransformerEncoder(layer, 1).train()
    prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=x if with_example else None)
    apot_fx.calibrate(prepared, [x], progress=False)
    rows = apot_fx.explain(prepared).rows
    assert sum(row["form"] == "quantized" for row in rows) == 4
    assert apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [x]).ok


def test_one_tensor_given_twice() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2)

        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return self.attend(q, k, k)[0]

    x = torch.randn(3, 2, 8)
    prepared = apot_fx.prepare_apot(Cross().eval(), "w4a4", example_inputs=(x, x))
    apot_fx.calibrate(prepared, [(x, x)], progress=False)
    assert apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [(x, x)]).ok


def by_kind(self: Any, x: Any) -> torch.Tensor:
    return self.b(self.a(x[0] if isinstance(x, (list, tuple)) else x))


def test_isinstance_of_an_argument_is_guarded() -> None:
    for first, other in ((X, [X]), ([X], X)):
        prepared = apot_fx.prepare_apot(model_of(by_kind), "w4a4", example_inputs=(first,))
        with pytest.raises(GuardError, match="example_inputs"):
            prepared(other)


def multiplies_sparse(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.b(torch.sparse.mm(self.adjacent, self.a(x)))


@pytest.mark.parametrize("with_example", [False, True])
def test_sparse_buffers(with_example: bool) -> None:
    model = model_of(multiplies_sparse)
    model.register_buffer("adjacent", torch.eye(4).to_sparse())
    check(model, [(X,)], with_example)


def test_layers_in_plain_containers() -> None:
    class Lists(Base):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.table = [self.a, torch.relu], {"last": self.b}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 1e9:
                return x
            for step in self.steps:
                x = step(x)
            return self.table["last"](x)

    prepared = check(Lists().eval(), [(X,)], with_example=True)
    assert sum(row["form"] == "quantized" for row in apot_fx.explain(prepared).rows) == 2


def test_random_draws_of_python_code() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)[torch.randperm(len(x))])

    prepared = apot_fx.prepare_apot(model_of(forward), "w4a4", example_inputs=X)
    apot_fx.calibrate(prepared, [X], progress=False)
    assert apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [X]).ok


def asks_for_gradients(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.b(self.a(x) * (2 if torch.is_grad_enabled() else 3))


def seeds(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.rand_like(x)
    return self.b(self.a(x) + noise)


def differentiates(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.a(x).square().sum(), x)[0]


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("forward", [asks_for_gradients, seeds, differentiates])
def test_state_outside_of_the_graph(forward: Callable[..., Any], with_example: bool) -> None:
    model = model_of(forward)
    prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=X if with_example else None)
    prepared.apply(apot_fx.disable_observer).apply(apot_fx.disable_fake_quant)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            assert same_bits(prepared(X), model(X)) and same_bits(prepared(X), model(X))
