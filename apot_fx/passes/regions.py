"""Regions of an exported graph that switch gradients off or on, written out in the graph itself.

Export puts ``with torch.no_grad():`` into a graph of its own, where no layer could be quantized.
What leaves such a region is detached instead: the same bits, and no gradient either.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_REGION = "wrap_with_set_grad_enabled"


def inlined(exported: fx.GraphModule) -> fx.Graph:
    """A copy of an exported module's graph without regions; other higher-order calls stay."""
    graph = fx.Graph()
    graph.set_codegen(exported.graph._codegen)
    graph.output(_copy(exported, graph, {}))
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users and str(node.target) in exported._modules:
            graph.erase_node(node)
    return graph


def _copy(owner: fx.GraphModule, graph: fx.Graph, new: dict[fx.Node, Any]) -> Any:
    """Add a module's nodes to a graph; what its output node gives."""
    inside: dict[fx.Node, list[Any]] = {}
    for node in owner.graph.nodes:
        if node in new:
            continue
        source = node.args[0] if node.args else None
        region = _region(owner, node)
        if node.op == "output":
            return fx.map_arg(node.args[0], new.__getitem__)
        if isinstance(source, fx.Node) and source in inside:
            new[node] = inside[source][node.args[1]]
        elif region is not None:
            given = [new[argument] for argument in node.args[2:]]
            starts = [n for n in region.graph.nodes if n.op == "placeholder"]
            results = _copy(region, graph, dict(zip(starts, given, strict=True)))
            inside[node] = [result if node.args[0] else _detached(result) for result in results]
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
    return None


def _region(owner: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The graph of a region that can be written out; None for any other node."""
    called = node.target
    if not isinstance(called, torch._ops.HigherOrderOperator) or called._name != _REGION:
        return None
    body = node.args[1]
    assert isinstance(body, fx.Node)
    region = owner.get_submodule(str(body.target))
    if not isinstance(region, fx.GraphModule):
        return None
    plain = all(n.op != "get_attr" for n in region.graph.nodes)
    members = all(user.target is operator.getitem for user in node.users)
    nodes = all(isinstance(argument, fx.Node) for argument in node.args[2:])
    return region if plain and members and nodes else None


def _detached(result: Any) -> Any:
    if not isinstance(result, fx.Node) or not isinstance(result.meta.get("val"), torch.Tensor):
        return result
    detached = result.graph.call_function(torch.ops.aten.detach.default, (result,))
    detached.meta = dict(result.meta)
    return detached
