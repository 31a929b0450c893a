"""How an exported module is called, as nodes of a graph: inputs taken apart, outputs put together.

An export knows tensors only; a code generator around it takes dicts, tuples and objects of users'
classes apart and puts them together. In the graph itself every pass and every run sees it.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from ..errors import GuardError
from ..graph import KIND


class Parts:
    """Takes an object of a registered class apart; a call target with a name."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self.__name__ = self.__qualname__ = "parts"
        self.spec = spec

    def __call__(self, value: Any) -> list[Any]:
        parts, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
        if spec.type is not self.spec.type or len(parts) != len(_children(self.spec)):
            raise GuardError(
                f"an argument was a {_type_name(self.spec)} when the model was exported and is a "
                f"{type(value).__name__} now"
            )
        return parts


class Whole:
    """Puts an object of a registered class together; a call target with a name."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        self.__name__ = self.__qualname__ = "whole"
        leaf = pytree.tree_structure(0)
        self.spec = pytree.TreeSpec(spec.type, spec.context, [leaf] * len(_children(spec)))

    def __call__(self, *parts: Any) -> Any:
        return pytree.tree_unflatten(parts, self.spec)


def check_exported(value: object, expected: object, name: str) -> None:
    """Graph node: a number or option must be what it was in the export; raises GuardError."""
    same = value is expected or (type(value) is type(expected) and value == expected)
    if not same:
        raise GuardError(
            f"argument {name!r} was exported as {expected!r} and is {value!r} now; export the "
            "model with that value, or as an input that may change (dynamic_shapes)"
        )


def add_inputs(old: fx.Graph, new: fx.Graph, made: dict[fx.Node, Any]) -> None:
    """Placeholders for the arguments of ``old``'s forward, and the nodes that take them apart.

    ``made`` gets what stands for each placeholder of ``old``.
    """
    leaves = [node for node in old.nodes if node.op == "placeholder"]
    codegen = old._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        for leaf in leaves:
            made[leaf] = new.node_copy(leaf)
    else:
        names, tree = codegen.pytree_info.orig_args, codegen.pytree_info.in_spec
        specs = _children(tree)
        if [spec.type for spec in specs] == [tuple, dict]:
            specs = [*_children(specs[0]), *_children(specs[1])]
        arguments = [new.placeholder(name) for name in names]
        pending = iter(leaves)
        for argument, spec in zip(arguments, specs, strict=True):
            _take_apart(new, argument, spec, pending, made)
    for leaf in leaves:
        if "val" in leaf.meta and not isinstance(leaf.meta["val"], (torch.Tensor, *_SYMBOLS)):
            facts = (made[leaf], leaf.meta["val"], str(leaf.target))
            new.call_function(check_exported, facts).meta["keep"] = True


_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def _take_apart(
    graph: fx.Graph, value: fx.Node, spec: pytree.TreeSpec, leaves: Any, made: dict[fx.Node, Any]
) -> None:
    if spec.is_leaf():
        leaf = next(leaves)
        given = leaf.meta.get("val")
        value.meta[KIND] = "tensor" if isinstance(given, torch.Tensor) else "other"
        made[leaf] = value
        return
    value.meta[KIND] = "other"
    keys: Any = range(len(_children(spec)))
    parts = value
    if issubclass(spec.type, dict):
        keys = spec.context[1] if spec.type is defaultdict else spec.context
    elif not issubclass(spec.type, (tuple, list)):
        parts = graph.call_function(Parts(spec), (value,))
        parts.meta[KIND] = "other"
    for key, child in zip(keys, _children(spec), strict=True):
        part = graph.call_function(operator.getitem, (parts, key))
        _take_apart(graph, part, child, leaves, made)


def add_outputs(old: fx.Graph, new: fx.Graph, results: Any) -> None:
    """The output node, which gives what ``old``'s forward gives for these flat results."""
    codegen = old._codegen
    if isinstance(codegen, _PyTreeCodeGen) and codegen.pytree_info.out_spec is not None:
        flat = iter(results if isinstance(results, (tuple, list)) else (results,))
        results = _put_together(new, codegen.pytree_info.out_spec, flat)
    new.output(results)


def _put_together(graph: fx.Graph, spec: pytree.TreeSpec, flat: Any) -> Any:
    if spec.is_leaf():
        return next(flat)
    parts = [_put_together(graph, child, flat) for child in _children(spec)]
    if spec.type is dict:
        return dict(zip(spec.context, parts, strict=True))
    if spec.type in (tuple, list):
        return spec.type(parts)
    return graph.call_function(Whole(spec), tuple(parts))


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    return list(spec.children())


def _type_name(spec: pytree.TreeSpec) -> str:
    return getattr(spec.type, "__name__", str(spec.type))
