"""Capture: as much of a model in graphs as can be followed, and the rest in Python.

From the root down, a module becomes a stage where it can be traced and, with example inputs, gives
the bits of the float model; else its children are tried, and the layers that Python code calls
become standalone layers. What can't be followed inside a stage is a leaf of it, and its insides are
captured the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn

from ..errors import GuardError, TraceError
from ..graph import called_module, module_calls
from ..nn import RECURRENT, Expanded, is_standalone_type
from ..passes import capture_passes, run_passes, trace
from ..passes.annotate import OuterLayers, has_weights
from ..passes.example import Call
from ..passes.exported import taken_over
from ..passes.opaque_call import OpaqueCall
from ..passes.stage import StageModule
from ..passes.tree import joined
from .floats import Calls, calls_inside, check_bits, resized

Ends = tuple[bool, bool]


@dataclasses.dataclass
class Captured:
    """What was found in a model, by path; nothing of it is quantized yet.

    ``ends``: whether a stage's or layer's inputs and outputs are the model's.
    """

    stages: dict[str, StageModule] = dataclasses.field(default_factory=dict)
    layers: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    ends: dict[str, Ends] = dataclasses.field(default_factory=dict)
    opaque: dict[str, str] = dataclasses.field(default_factory=dict)  # what stays Python → why
    read: dict[str, str] = dataclasses.field(default_factory=dict)  # layers that stay float → why


def capture(model: nn.Module, call: Call | None, in_graphs: bool = True) -> Captured:
    """Capture a model, which keeps its modules, attributes and values.

    ``call``: example inputs, by which every graph is verified, with other sizes too.
    ``in_graphs=False`` keeps all of the user's code in Python: only standalone layers are found.
    """
    search = _Search(in_graphs)
    calls = None
    if call is not None:
        # A rebuilt graph is the model: other sizes say nothing about whether it was followed.
        more = [] if isinstance(model, StageModule) else resized(model, call)
        calls = Calls.of([call, *more])
    search.visit("", model, calls, (True, True))
    return search.found


class _Search:
    def __init__(self, in_graphs: bool) -> None:
        self.in_graphs = in_graphs
        self.found = Captured()
        self.seen: set[int] = set()
        self.read: dict[str, str] = {}  # layers whose parameters other code reads → where

    def visit(self, path: str, module: nn.Module, calls: Calls | None, ends: Ends) -> None:
        """Capture a module that Python code calls; ``calls``: how, as far as is known."""
        if id(module) in self.seen or (path and not _holds_layers(module)):
            return
        self.seen.add(id(module))
        self.found.ends[path] = ends
        if path in self.read:
            self.found.read[path] = f"its weight is read at {self.read[path]} without calling it"
            return
        if not path and isinstance(module, tuple(RECURRENT)):
            self.found.opaque[path] = "it is the model itself; prepare nn.Sequential(model) instead"
            return
        if is_standalone_type(type(module)) and path and "forward" not in module.__dict__:
            self.found.layers[path] = module
            return
        try:
            stage = self._stage(path, module, calls)
        except TraceError as problem:
            if type(module).forward is not nn.Module.forward:  # a mere container
                self.found.opaque[path] = str(problem)
            inside = self._inside(path, module, calls)
            self._visit_children(path, module, inside, ends)
            return
        self.found.stages[path] = stage
        self._visit_leaves(path, stage, calls, ends)

    def _stage(self, path: str, module: nn.Module, calls: Calls | None) -> StageModule:
        """A verified stage of a module; raises TraceError where there is none."""
        if not self.in_graphs:
            raise TraceError("a graph of the model gave other bits than the model")
        if calls is not None and not calls.alike:
            raise TraceError("it is called with arguments of several kinds")
        writing = [m for m in module.modules() if getattr(m, "inplace", False) is True]
        refused: set[str] = set()
        admits = calls is not None
        while True:
            try:
                stage = _verified(path, module, calls, refused, admits)
                if not refused or calls is None or not _loses_layers(stage, calls):
                    return stage
                # Rather guarded sizes than float layers.
                return _verified(path, module, calls.first, set(), admits)
            except GuardError as guard:
                _set_inplace(writing)
                if not guard.line or guard.line in refused:
                    raise
                refused.add(guard.line)
            except TraceError:
                _set_inplace(writing)
                if not admits:
                    raise
                admits = False  # its code may compute otherwise once it knows of the trace

    def _inside(self, path: str, module: nn.Module, calls: Calls | None) -> dict[str, Calls] | None:
        """How a module calls what is below it, by relative path; None without an example."""
        if calls is None:
            return None
        try:
            inside, reads = calls_inside(module, calls)
        except Exception:  # torch's own tracers (cond, flex_attention) refuse to be watched
            return None
        self.read.update({joined(path, name): line for name, line in reads.items()})
        return inside

    def _visit_children(
        self,
        path: str,
        module: nn.Module,
        inside: dict[str, Calls] | None,
        ends: Ends,
        below: str = "",
    ) -> None:
        """Visit what a module holds; ``inside``: who is called, by path from the caller."""
        children = [(name, m) for name, m in module.named_children() if _holds_layers(m)]
        if inside:  # in the order in which they are called
            order = {path: place for place, path in enumerate(inside)}
            children.sort(key=lambda child: order.get(joined(below, child[0]), len(order)))
        for place, (name, child) in enumerate(children):
            first, last = place == 0, place == len(children) - 1
            outer = ends[0] and first, ends[1] and last
            relative, full = joined(below, name), joined(path, name)
            own = None if inside is None else inside.get(relative)
            if own is None and inside and any(key.startswith(f"{relative}.") for key in inside):
                self._visit_children(full, child, inside, outer, relative)
            else:
                self.visit(full, child, own, outer)

    def _visit_leaves(self, path: str, stage: StageModule, calls: Calls | None, ends: Ends) -> None:
        leaves = {leaf: stage.get_submodule(leaf) for leaf in stage.apot.opaque}
        leaves = {leaf: module for leaf, module in leaves.items() if _holds_layers(module)}
        if not leaves:
            return
        outer, called = OuterLayers(stage), module_calls(stage.graph)
        inside = self._inside(path, stage, calls)
        below = None if inside is None else _by_leaf(leaves, inside)
        for leaf, module in leaves.items():
            if id(module) in self.seen:
                continue
            self.seen.add(id(module))
            full = joined(path, leaf)
            self.found.opaque[full] = stage.apot.opaque[leaf]
            own = None if below is None else below[leaf]
            self._visit_children(full, module, own, outer.of(called.get(leaf, ()), ends))


def _by_leaf(leaves: Iterable[str], inside: dict[str, Calls]) -> dict[str, dict[str, Calls]]:
    """Calls below each leaf, by the path from it."""
    found: dict[str, dict[str, Calls]] = {leaf: {} for leaf in leaves}
    for path, calls in inside.items():
        for end, letter in enumerate(path):
            if letter == "." and path[:end] in found:
                found[path[:end]][path[end + 1 :]] = calls
    return found


def _verified(
    path: str, module: nn.Module, calls: Calls | None, refused: set[str], admits: bool
) -> StageModule:
    example = None if calls is None else calls.examples[0]
    traced = taken_over(module)
    if traced is None:
        traced = trace(module, example, (), refused, settles_sizes=not path, admits=admits)
    stage = run_passes(traced, capture_passes())
    if calls is not None:
        check_bits(stage, module, calls)
    elif path and not isinstance(module, Expanded) and _has_guards(stage):
        raise TraceError("how its caller sets its options is not known without example_inputs")
    return stage


def _has_guards(stage: StageModule) -> bool:
    return any(n.meta.get("keep") for n in stage.graph.nodes if n.op == "call_function")


def _loses_layers(stage: StageModule, calls: Calls) -> bool:
    """Whether code that stays Python uses weights of layers, which then stay float."""
    owners = {
        f"{path}.{name}"
        for path, layer in stage.named_modules()
        if has_weights(layer)
        for name, _ in layer.named_parameters(recurse=False)
    }
    for node in stage.graph.nodes:
        if isinstance(called_module(stage, node), OpaqueCall):
            read = {str(n.target) for n in node.all_input_nodes if n.op == "get_attr"}
            if read & owners:
                return True
    leaves = [stage.get_submodule(leaf) for leaf in stage.apot.opaque]
    return any(map(_holds_layers, leaves)) and bool(calls_inside(stage, calls)[1])


def _set_inplace(modules: list[nn.Module]) -> None:
    """Functionalize may have switched it off."""
    for module in modules:
        module.inplace = True  # type: ignore[assignment]


def _holds_layers(module: nn.Module) -> bool:
    return any(map(has_weights, module.modules()))
