"""Exported modules: what ``torch.export.export(…).module()`` gives becomes a graph like any other.

Such a module holds operator calls on tensors that it keeps in bare containers, refuses ``train()``
and ``eval()``, and checks its inputs. It is rebuilt as a traced stage: operator calls on the
tensors of a layer become calls of that live layer at its old path, other ones torch functions
(``aten_twins``), the guards go, inputs and outputs are taken apart and put together by nodes of the
graph. Parameters and buffers are the very same ones under the same keys.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from ..graph import KIND, free_name, is_kind, user_line
from .aten_layers import LayerCall, layer_call
from .aten_recurrent import member, recurrent_call
from .aten_twins import twin_of
from .calling import add_inputs, add_outputs
from .containers import Containers, attribute_at
from .normalize import LiveBatchNorm
from .operators import (
    base_name,
    bound_arguments,
    operator_alias_kind,
    operator_of,
    written_arguments,
)
from .regions import inlined
from .report import PassReport
from .stage import NodeInfo, StageModule, set_info

_GUARDS = "torch.export._unlift.GuardsFn"
_ASSERTS = ("_assert", "sym_constrain_range", "_check")
#: What export puts behind a tensor that the forward makes of Python numbers.
_SAME_VALUE = ("lift_fresh_copy", "lift_fresh", "detach_", "detach", "alias")


def is_exported(module: nn.Module) -> bool:
    """Whether a module is what ``torch.export.export(…).module()`` gives, or as low as that."""
    if not isinstance(module, fx.GraphModule) or isinstance(module, StageModule):
        return False
    refuses = "train" in module.__dict__ and "eval" in module.__dict__
    return refuses or any(_is_aten(node) for node in module.graph.nodes)


def _is_aten(node: fx.Node) -> bool:
    called = operator_of(node)
    return called is not None and called.namespace == "aten"


def rebuild(exported: fx.GraphModule) -> StageModule:
    """A traced stage that computes the same, with live layers.

    Batch norm and dropout are in the mode in which they were exported.
    """
    return _Rebuilding(exported).run()


def taken_over(module: nn.Module) -> StageModule | None:
    """A stage on a rebuilt one's modules and a copy of its graph; None for other modules."""
    if not isinstance(module, StageModule) or module.apot.kind != "traced":
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, copies)
    graph.output(result)
    for node, copy in copies.items():
        copy.meta = dict(node.meta)
    stage = StageModule(module, graph, "traced")
    stage.apot.origin, stage.apot.ids = module.apot.origin, module.apot.ids
    stage.apot.opaque.update(module.apot.opaque)
    stage.apot.reports.extend(module.apot.reports)
    return stage


class _Rebuilding:
    """One rebuild: the old graph is read, the new one is written node by node."""

    def __init__(self, exported: fx.GraphModule) -> None:
        self.exported = exported
        self.old = inlined(exported)
        self.containers = Containers(exported, self.old)
        self.graph = fx.Graph()
        self.new: dict[fx.Node, Any] = {}
        self.report = PassReport("exported")
        self.calls = self._layer_calls()

    def _layer_calls(self) -> dict[fx.Node, tuple[LayerCall, str]]:
        """Every call that a live layer takes over, and the layer's path."""
        found: dict[fx.Node, tuple[LayerCall, str]] = {}
        for node in self.old.nodes:
            call = layer_call(node, self._shape) or recurrent_call(node, self._shape)
            path = self.containers.place(call, node) if call is not None else ""
            if call is not None and path:
                found[node] = call, path
        self.containers.share()
        return found

    def _shape(self, node: Any) -> torch.Size:
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            raise LookupError
        return torch.Size(attribute_at(self.exported, str(node.target)).shape)

    def run(self) -> StageModule:
        add_inputs(self.old, self.graph, self.new)
        for node in self.old.nodes:
            if node.op == "output":
                add_outputs(self.old, self.graph, self._mapped(node.args[0]))
            elif node not in self.new and not self._is_dropped(node):
                self._add(node)
        for number, node in enumerate(self.graph.nodes):
            origin = node.meta.get("origin", "")
            kind, keep = node.meta.get(KIND), node.meta.get("keep")
            node.meta = {k: v for k, v in ((KIND, kind), ("keep", keep)) if v is not None}
            set_info(node, NodeInfo(id=number, origin=origin))
        stage = StageModule(self.containers.root, self.graph, "traced")
        stage.apot.ids = len(self.graph.nodes)
        stage.apot.reports.append(self.report)
        return stage

    def _mapped(self, arguments: Any) -> Any:
        return fx.map_arg(arguments, self.new.__getitem__)

    def _is_dropped(self, node: fx.Node) -> bool:
        """Guards, asserts, and the counter that a live batch norm keeps by itself."""
        if node.op == "call_module":
            return is_kind(attribute_at(self.exported, str(node.target)), _GUARDS)
        called = operator_of(node)
        if called is None:
            return False
        if base_name(called).startswith(_ASSERTS) and not node.users:
            return True
        return any(self._is_counter(target) for target in written_arguments(node))

    def _is_counter(self, node: fx.Node) -> bool:
        path, _, name = str(node.target).rpartition(".")
        counts = node.op == "get_attr" and name == "num_batches_tracked"
        return counts and self.containers.is_live(path)

    def _add(self, node: fx.Node) -> None:
        if node in self.calls:
            call, path = self.calls[node]
            given = (call.x,) if call.state is None else (call.x, call.state)
            made = self.graph.call_module(path, self._mapped(given))
            self._put(node, made, call.first)
            if call.state is not None:
                made.meta[KIND] = "other" if isinstance(call.state, tuple) else "tuple"
                for user in node.users:
                    self._put(user, member(made, int(str(user.args[1])), call), False)
            self.report.change(path, f"{call.kind.__name__} in place of {operator_of(node)}")
        elif _is_batch_norm(node):
            self._add_batch_norm(node)
        elif self._copies_constant(node):
            self.new[node] = self.new[node.all_input_nodes[0]]
        else:
            self._add_twin(node)

    def _copies_constant(self, node: fx.Node) -> bool:
        """Whether a call copies a constant that is only read: the constant itself will do."""
        called = operator_of(node)
        if called is None or base_name(called) not in _SAME_VALUE:
            return False
        source = self.new[node.all_input_nodes[0]]
        if not isinstance(source, fx.Node) or source.op != "get_attr" or _is_written(node):
            return False
        return not bool(attribute_at(self.exported, str(source.target)).requires_grad)

    def _add_twin(self, node: fx.Node) -> None:
        first_only = bool(node.users) and all(_is_first(user) for user in node.users)
        twin = twin_of(node, first_only)
        if twin is None:
            made = self.graph.node_copy(node, self.new.__getitem__)
            self._put(node, made, False)
            if operator_of(node) is not None:
                self.report.leave(made, f"no torch function computes exactly {node.target}")
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                self.report.leave(made, f"what {node.target} runs stays float")
            return
        args, kwargs = self._mapped(twin.args), self._mapped(twin.kwargs)
        made = self.graph.create_node(twin.op, twin.target, args, kwargs, node.name)
        self._put(node, made, twin.first)

    def _add_batch_norm(self, node: fx.Node) -> None:
        """Batch norm on tensors that are no layer's: its training flag follows the model."""
        bound = bound_arguments(node)
        momentum, eps, training = (bound[key] for key in ("momentum", "eps", "training"))
        keys = ("input", "running_mean", "running_var", "weight", "bias")
        root = self.containers.root
        name = free_name(root, "functional_batch_norm")
        root.add_module(name, LiveBatchNorm(momentum, eps).train(bool(training)))
        made = self.graph.call_module(name, self._mapped(tuple(bound[key] for key in keys)))
        self._put(node, made, False)

    def _put(self, node: fx.Node, made: fx.Node, first: bool) -> None:
        """Let ``made`` stand for a node of the old graph, or for the first of its values."""
        made.meta = {"origin": user_line(node)}
        readers = list(node.users) if first else [node]
        kind = _kind(readers[0] if readers else node)
        if kind:
            made.meta[KIND] = kind
        self.new[node] = made
        if first:
            self.new.update(dict.fromkeys(readers, made))


def _is_first(user: fx.Node) -> bool:
    return user.target is operator.getitem and bool(user.args[1] == 0)


def _is_batch_norm(node: fx.Node) -> bool:
    called = operator_of(node)
    return called is not None and base_name(called) == "batch_norm"


def _is_written(node: fx.Node) -> bool:
    """Whether somebody writes into a value, directly or through a view."""
    for user in node.users:
        called = operator_of(user)
        if called is None:
            continue
        name = base_name(called)
        if node in written_arguments(user) and name != "detach_":
            return True
        if (name == "detach_" or operator_alias_kind(called) != "fresh") and _is_written(user):
            return True
    return False


def _kind(node: fx.Node) -> str:
    """The kind of a node's value, as the export saw it; ``""`` where that is not known."""
    if "val" not in node.meta:
        return ""
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return "tensor"
    several = isinstance(value, (tuple, list)) and bool(value)
    return "tuple" if several and all(isinstance(v, torch.Tensor) for v in value) else "other"
