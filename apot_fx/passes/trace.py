"""Trace a model into a ``StageModule``: the first step of prepare.

Beyond ``torch.fx``'s tracer: buffers are graph inputs (so that in-place updates of them show),
``self.training`` handed to a functional dropout is recognised (see ``training_flags``), optional
arguments are fixed under a guard (``arguments``), example inputs let values flow along (``proxy``),
and what can't be followed is left in one piece, the smallest that can be (``attempts``): a
function (``opaque_call``) or a submodule.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn

from ..errors import TraceError
from ..graph import HOLDS, KIND, value_kind
from ..values import tensors_in
from .attempts import Attempts, opaque_functions
from .example import Call
from .lines import LINE
from .patches import AskingValues, recording_factories, tracing_into_wrapped
from .purity import Attributes, random_state, watching_globals
from .refusal import Untraceable
from .report import PassReport
from .stage import NodeInfo, StageModule, set_info
from .tracer import ApotTracer
from .training_flags import settle_training_flags, training_flags


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    leaf_modules: Iterable[type[nn.Module] | str] = (),
    refused_lines: Iterable[str] = (),
    settles_sizes: bool = True,
    admits: bool = True,
) -> StageModule:
    """Trace ``model`` (taken over, not copied) into a stage of kind ``"traced"``.

    ``refused_lines``: ``file.py:12``, decisions that the example does not settle.
    ``settles_sizes``: whether it settles decisions on sizes (under a guard in the graph).
    ``admits``: whether code that asks if it is being traced is told so.

    Raises TraceError where the model's own forward can't be followed.
    """
    example = None if example_inputs is None else Call.of(example_inputs)
    if example is not None:
        example.bound(model)
    attempts = Attempts()
    before = Attributes(model)
    while True:
        tracer = ApotTracer([*leaf_modules, *attempts.modules])
        tracer.example = None if example is None else example.copied()
        tracer.refused_lines = frozenset(refused_lines)
        tracer.settles_sizes, tracer.admits = settles_sizes, admits
        branches: list[tuple[str, str]] = []
        try:
            graph = _attempt(model, tracer, attempts, branches)
        except Exception as problem:
            before.restore()
            attempts.learn(model, tracer, problem)
            continue
        kept = {name: model._modules.pop(name) for name in tracer.opaque}
        constants = _take_constants(model)
        changed = {n: k for n, k in before.changed().items() if n not in attempts.modules}
        written = before.written()
        before.restore()
        if written:
            raise TraceError(f"{type(model).__name__} can't be traced: it writes into {written}")
        if changed:
            _settle_changed(model, attempts, changed)
            continue
        both_ways = _switched_without_layers(model, branches)
        if both_ways.keys() - attempts.modules.keys():  # else it is no call of it that decides
            attempts.modules.update(both_ways)
            continue
        model._modules.update(kept)
        for name, value in constants.items():
            setattr(model, name, value)
        del before  # it holds weights, and fx leaves frames behind until garbage is collected
        return _as_stage(model, graph, tracer, attempts, branches)


def _settle_changed(model: nn.Module, attempts: Attempts, changed: dict[str, str]) -> None:
    if "" in changed:
        raise TraceError(
            f"{type(model).__name__} can't be traced: its forward sets the attribute "
            f"{changed['']!r}"
        )
    for name, key in changed.items():
        attempts.modules[name] = f"its forward sets the attribute {key!r}"


def _switched_without_layers(
    model: nn.Module, branches: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """Submodules without parameters that ask for the mode: as leaves they go on following it."""
    return {
        owner: f"decides by self.training at {line}"
        for owner, line in branches
        if owner and next(model.get_submodule(owner).parameters(), None) is None
    }


def _take_constants(model: nn.Module) -> dict[str, Any]:
    """Tensors that the trace found outside of the model's parameters and buffers."""
    names = [name for name in model.__dict__ if name.startswith("_tensor_constant")]
    return {name: model.__dict__.pop(name) for name in names}


def _attempt(
    model: nn.Module, tracer: ApotTracer, attempts: Attempts, branches: list[tuple[str, str]]
) -> fx.Graph:
    def branched(owner: str, line: str) -> None:
        if not tracer.concrete:
            branches.append((owner, line))

    asking = AskingValues(tracer.admits)
    with (
        torch.random.fork_rng(enabled=tracer.example is not None),
        training_flags(model, branched),
        recording_factories(tracer),
        opaque_functions(tracer, attempts),
        tracing_into_wrapped() if tracer.example is not None else nullcontext(),
        watching_globals(tracer.notice_outside_state, asking.visit),
    ):
        before, latest = random_state(), Untraceable.latest
        try:
            graph = tracer.trace(model)
            tracer.check_swallowed(latest)
        finally:
            asking.restore()
        if random_state() != before:
            raise Untraceable("it draws random numbers of Python or NumPy")
        if "" in tracer.outside_state:
            raise Untraceable(f"it {tracer.outside_state['']}")
    return graph


def _as_stage(
    model: nn.Module,
    graph: fx.Graph,
    tracer: ApotTracer,
    attempts: Attempts,
    branches: Iterable[tuple[str, str]],
) -> StageModule:
    _guards_first(graph)
    for number, node in enumerate(graph.nodes):
        settle_training_flags(node)
        reason = attempts.modules.get(str(node.target), "") if node.op == "call_module" else ""
        set_info(node, NodeInfo(id=number, origin=node.meta.pop(LINE, ""), reason=reason))
        node.meta.pop("nn_module_stack", None)
        known = node in tracer.values
        # Once and in order: asked of a node alone, long chains of sums would be walked each time.
        node.meta[KIND] = _kind(tracer.values[node]) if known else value_kind(node)
        if known and node.meta[KIND] == "other":
            node.meta[HOLDS] = bool(tensors_in(tracer.values[node]))
    tracer.values.clear()  # they know weights by their gradients, and a tracer lives on in cycles
    stage = StageModule(model, graph, "traced")
    stage.apot.opaque.update(attempts.modules)
    stage.apot.ids = len(graph.nodes)
    report = PassReport("trace")
    for name, why in attempts.modules.items():
        report.leave(name, why)
    for name, why in attempts.reasons.items():
        report.leave(name, why)
    for line in dict.fromkeys(line for _, line in branches):
        mode = "train" if model.training else "eval"
        report.leave(line, f"`if self.training` decided once, as in {mode}")
    stage.apot.reports.append(report)
    return stage


def _guards_first(graph: fx.Graph) -> None:
    """Guards of arguments stand before all else: other calls would fail otherwise than they do."""
    place = [node for node in graph.nodes if node.op == "placeholder"]
    for node in graph.nodes:
        guards = node.op == "call_function" and node.meta.get("keep") and node.all_input_nodes
        if guards and all(source.op == "placeholder" for source in node.all_input_nodes):
            place[-1].append(node)
            place.append(node)


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "tensor"
    several = isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)
    return "tuple" if several and all(isinstance(v, torch.Tensor) for v in value) else "other"
