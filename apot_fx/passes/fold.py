"""Plan and write the batch norm folds: layer and batch norm become one call (contract 4.6).

In train the call runs batch norm live, so statistics and gradients are the user's.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ..graph import argument, called_module, describe_call
from ..nn import PreparedLayer, can_fold
from ..nn.fold import BATCH_NORMS
from .annotate import plan_of
from .base import Pass
from .functional_layers import computed_operands
from .functionalize import is_functional
from .report import PassReport
from .stage import StageModule, info, next_id, set_info


class FoldBatchNorm(Pass):
    """Join a planned layer with the batch norm that is its only reader.

    The layer's call becomes ``layer(x, None, batch_norm)``, the second place being the fake-quant
    that ``insert`` puts there; the joined value has the batch norm's provenance.
    """

    name = "fold"
    requires = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        calls: dict[int, int] = {}
        for node in stage.graph.nodes:
            module = called_module(stage, node)
            calls[id(module)] = calls.get(id(module), 0) + 1
        for node in list(stage.graph.nodes):
            norm = called_module(stage, node)
            layer_node = node.args[0] if node.args else None
            if not isinstance(norm, BATCH_NORMS) or not isinstance(layer_node, fx.Node):
                continue
            layer = called_module(stage, layer_node)
            plan = plan_of(layer_node)
            if layer is None or plan is None or plan.weight is None:
                continue
            why = _why_not(stage, layer_node, node, calls[id(layer)])
            if why:
                report.leave(node, f"not folded into {layer_node.target}: {why}")
                continue
            _join(layer_node, node)
            report.change(layer_node.target, f"batch norm {node.target} folded into its call")


class SplitBatchNorm(Pass):
    """Part a fold again where a layer met inputs whose channels batch norm does not normalise.

    A graph doesn't show ranks: that Linear's 3-d output has its channels last, and BatchNorm1d
    normalises axis 1, is known once the model ran.
    """

    name = "split"

    def run(self, stage: StageModule, report: PassReport) -> None:
        for node in list(stage.graph.nodes):
            layer = called_module(stage, node)
            norm = argument(node, 2, "batch_norm")
            if not isinstance(layer, PreparedLayer) or not layer.norm_apart or norm is None:
                continue
            with stage.graph.inserting_after(node):
                call = stage.graph.call_module(str(norm.target))
            node.replace_all_uses_with(call)
            call.args, node.args = (node,), (*node.args[:2], None, *node.args[3:])
            set_info(call, info(node))
            set_info(node, id=next_id(stage.graph))
            report.change(node, f"batch norm {norm.target} computes apart from it")


def _why_not(stage: StageModule, layer_node: fx.Node, node: fx.Node, calls: int) -> str:
    layer, norm = called_module(stage, layer_node), called_module(stage, node)
    assert isinstance(layer, nn.Module) and isinstance(norm, nn.Module)
    readers = [describe_call(stage, user) for user in layer_node.users if user is not node]
    if readers:
        return f"its output is also read by {', '.join(readers)}"
    if calls > 1:
        return f"the layer is called {calls} times"
    if node.kwargs or len(node.args) != 1 or node.meta.get("pinned"):
        return "batch norm is not called with one tensor"
    weight = (computed_operands(stage, layer_node) or (layer.weight,))[0]
    assert isinstance(weight, torch.Tensor)
    return can_fold(layer, norm, weight)


def _join(layer_node: fx.Node, norm_node: fx.Node) -> None:
    graph = layer_node.graph
    with graph.inserting_before(layer_node):
        norm = graph.get_attr(str(norm_node.target))
    layer_node.args = (layer_node.args[0], None, norm, *layer_node.args[3:])
    layer = info(layer_node).layer
    set_info(layer_node, info(norm_node), layer=layer)
    norm_node.replace_all_uses_with(layer_node)
    graph.erase_node(norm_node)
