"""Exported programs: aten calls become live modules and torch's functions again.

``torch.export(…).module()`` computes by operator overloads on bare parameters, asserts by a guards
module, and refuses train() and eval(). Rebuilt, it is an ordinary GraphModule: layers stand under
the old parameter names, batch norm and dropout follow the mode, and everything else is the call
that a user would have written, so that all later passes know it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ..graph import free_name
from ..values import leaves_of, restored
from .aten_layers import LAYERS, LayerCall, live_layer

_ARITHMETIC: dict[str, Any] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "add_": operator.iadd,
    "sub_": operator.isub,
    "mul_": operator.imul,
    "div_": operator.itruediv,
    "matmul": torch.matmul,
    "relu": torch.relu,
}
_METHODS = {"sym_size": "size", "lift_fresh_copy": "clone", "_unsafe_view": "reshape"}
_CHECKS = ("_assert", "sym_constrain", "_guards")


def is_exported(model: nn.Module) -> bool:
    """Whether a module computes by aten's operator overloads."""
    return isinstance(model, fx.GraphModule) and any(
        _is_aten(node) for node in model.graph.nodes if node.op == "call_function"
    )


def rebuilt(exported: fx.GraphModule) -> fx.GraphModule:
    """The same computation by live modules, in eval; parameters and buffers are shared."""
    root = nn.Module()
    for registry in ("_modules", "_parameters", "_buffers"):
        getattr(root, registry).update(getattr(exported, registry))
    root._non_persistent_buffers_set.update(exported._non_persistent_buffers_set)
    root._modules.pop("_guards_fn", None)
    graph = _Rebuild(exported, root).graph
    made = fx.GraphModule(root, graph, type(exported).__name__)
    for registry in ("_modules", "_parameters", "_buffers"):
        getattr(made, registry).update(getattr(root, registry))
    made._non_persistent_buffers_set.update(root._non_persistent_buffers_set)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made.eval()


def _is_aten(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.namespace == "aten"


class _Rebuild:
    """Writes the new graph, node by node."""

    def __init__(self, exported: fx.GraphModule, root: nn.Module) -> None:
        self.exported, self.root = exported, root
        self.graph = fx.Graph()
        self.made: dict[fx.Node, Any] = {}
        self.layers: dict[str, LayerCall] = {}
        inputs = self._inputs()
        for node in exported.graph.nodes:
            if node.op == "placeholder":
                self.made[node] = next(inputs)
            elif node.op == "output":
                self.graph.output(self._outputs(node))
            elif not _is_check(node):
                self.made[node] = self._rewritten(node)

    def _inputs(self) -> Any:
        """The flat inputs, from placeholders under the names that forward had."""
        codegen = self.exported.graph._codegen
        info = getattr(codegen, "pytree_info", None)
        if info is None or info.in_spec is None:
            for node in self.exported.graph.nodes:
                if node.op == "placeholder":
                    yield self.graph.placeholder(str(node.target))
            return
        places = [self.graph.placeholder(name) for name in info.orig_args]
        groups = info.in_spec.children()
        specs = [spec for group in groups for spec in group.children()]
        for place, spec in zip(places, specs, strict=True):
            if spec.is_leaf():
                yield place
                continue
            leaves = self.graph.call_function(leaves_of, (place,))
            for number in range(spec.num_leaves):
                yield self.graph.call_function(operator.getitem, (leaves, number))

    def _outputs(self, node: fx.Node) -> Any:
        values = self._mapped(node.args[0])
        info = getattr(self.exported.graph._codegen, "pytree_info", None)
        spec = None if info is None else info.out_spec
        if spec is None:
            return values
        plain = (tuple, list, dict)
        if spec.is_leaf() or all(part.type in plain for part in _inner(spec)):
            return pytree.tree_unflatten(list(values), spec)
        return self.graph.call_function(restored, (list(values), spec))

    def _mapped(self, value: Any) -> Any:
        return fx.map_arg(value, lambda node: self.made[node])

    def _rewritten(self, node: fx.Node) -> fx.Node:
        args, kwargs = self._mapped(node.args), self._mapped(node.kwargs)
        if not _is_aten(node):
            return self.graph.create_node(node.op, node.target, args, kwargs)
        schema = _schema(node)
        name = str(schema.name).removeprefix("aten::")
        given = _by_name(schema, args, kwargs)
        if name == "dropout":
            path = free_name(self.root, "dropout")
            self.root.add_module(path, nn.Dropout(given["p"]))
            return self.graph.call_module(path, (given["input"],))
        if name in LAYERS:
            call = LAYERS[name](given)
            layer = live_layer(self.root, call, self.layers)
            if layer is not None:
                return self.graph.call_module(layer, (call.x,))
            return self.graph.call_function(call.function, (), call.arguments)
        return self._plain(node, name, args, kwargs)

    def _plain(self, node: fx.Node, name: str, args: Any, kwargs: Any) -> fx.Node:
        """The call that a user would have written."""
        if name in _ARITHMETIC and kwargs.get("alpha", 1) == 1 and len(args) == 2:
            return self.graph.call_function(_ARITHMETIC[name], args)
        if name == "slice":
            return self._slice(*args)
        for owner in (functional, torch):
            function: Any = getattr(owner, name, None)
            if name not in _METHODS and callable(function) and not hasattr(torch.Tensor, name):
                return self.graph.call_function(function, args, kwargs)
        method = _METHODS.get(name, name)
        first = node.args[0] if node.args else None
        if hasattr(torch.Tensor, method) and isinstance(first, fx.Node):
            return self.graph.call_method(method, args, kwargs)
        if callable(getattr(torch, name, None)):
            return self.graph.call_function(getattr(torch, name), args, kwargs)
        kept: Any = node.target
        return self.graph.call_function(kept, args, kwargs)

    def _slice(
        self, x: Any, axis: int = 0, start: Any = None, end: Any = None, step: Any = 1
    ) -> fx.Node:
        if axis < 0 or isinstance(end, fx.Node):
            plain: Any = torch.ops.aten.slice.Tensor
            return self.graph.call_function(plain, (x, axis, start, end, step))
        end = None if end == 2**63 - 1 else end
        index = (*(slice(None),) * axis, slice(start, end, step))
        return self.graph.call_function(operator.getitem, (x, index))


def _is_check(node: fx.Node) -> bool:
    name = str(node.target)
    return not node.users and any(part in name for part in _CHECKS)


def _schema(node: fx.Node) -> Any:
    assert isinstance(node.target, OpOverload)
    return node.target._schema


def _by_name(schema: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """A call's arguments by the schema's names, defaults filled in."""
    given = {argument.name: argument.default_value for argument in schema.arguments}
    given.update(zip((argument.name for argument in schema.arguments), args, strict=False))
    return given | kwargs


def _inner(spec: Any) -> list[Any]:
    """A spec and those below it that are no leaves."""
    if spec.is_leaf():
        return []
    return [spec, *(part for child in spec.children() for part in _inner(child))]
