"""Keep weights that others read: convert packs a layer's weight, and its Parameter goes.

A call that reads it beside the layer (a functional head on an embedding's weight, a norm of it)
gets the Parameter under a name of the stage's own.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from ..graph import called_module, constant_value, free_name
from ..nn import PreparedFunctional, PreparedOp
from .base import Pass
from .grammar import is_prepared
from .report import PassReport
from .stage import StageModule


class KeepWeights(Pass):
    """Register tensors of prepared layers that the graph reads with the stage, and read them there.

    What is then read by a layer alone is dropped when that is packed.
    """

    name = "keep_weights"
    ensures = (is_prepared,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        kept: dict[str, str] = {}
        for node in stage.graph.nodes:
            path, _, leaf = str(node.target).rpartition(".")
            owner = stage.get_submodule(path) if node.op == "get_attr" and path else None
            if not isinstance(owner, PreparedOp):
                continue
            value = constant_value(stage, node)
            if not isinstance(value, torch.Tensor) or _is_own(stage, node, owner):
                continue
            name = kept.get(str(node.target))
            if name is None:
                name = kept[str(node.target)] = free_name(stage, f"kept_{leaf}")
                if isinstance(value, nn.Parameter):
                    stage.register_parameter(name, value)
                else:
                    stage.register_buffer(name, value)
                report.change(node, f"{node.target} is read beside its layer: kept as {name}")
            node.target = name


def _is_own(stage: StageModule, node: fx.Node, owner: nn.Module) -> bool:
    """Whether a tensor reaches nothing but calls of the functional layer that holds it."""
    return isinstance(owner, PreparedFunctional) and all(
        called_module(stage, user) is owner
        or (user.op in ("call_method", "call_function") and _is_own(stage, user, owner))
        for user in node.users
    )
