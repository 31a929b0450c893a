"""Batch norms that stayed apart, on indices, where the config puts adds and pools there too."""

from __future__ import annotations

import dataclasses

from torch import fx

from ..config import ActivationSpec, QConfigMapping
from ..graph import called_module, free_name, source
from ..nn import PreparedNorm
from ..nn.fold import is_foldable
from .annotate import LayerPlan, plan_of
from .base import Pass
from .functionalize import is_functional
from .index_ops import bounds
from .report import PassReport
from .residual import put_operator, residual_bits
from .share import roots_of
from .stage import StageModule


@dataclasses.dataclass(frozen=True)
class QuantizeNorms(Pass):
    """Turn batch norms between quantized operators into operators on a grid.

    A pre-activation network has them behind a cat or an add, where no layer can take them in.
    """

    mapping: QConfigMapping

    name = "norms"
    requires = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        bits = residual_bits(self.mapping)
        if bits is None:
            return
        spec = ActivationSpec(bits, kind="uniform")
        for node in list(stage.graph.nodes):
            module = called_module(stage, node)
            if module is None or not is_foldable(module) or not _is_between(stage, node):
                continue
            target = str(node.target)
            with stage.graph.inserting_before(node):
                norm = stage.graph.get_attr(target)
            name, plan = free_name(stage, "apot_norm"), LayerPlan(None, spec)
            put_operator(stage, node, name, PreparedNorm(), node.args[0], plan)
            node.args = (node.args[0], None, norm)
            report.change(node, f"batch norm {target} on {spec.describe()}")


def _is_between(stage: StageModule, node: fx.Node) -> bool:
    """Whether it is called with one tensor, which quantized operators computed."""
    value = node.args[0] if len(node.args) == 1 and not node.kwargs else None
    if not isinstance(value, fx.Node) or node.meta.get("pinned") or node.meta.get("keep"):
        return False
    pending, seen = [value], set()
    while pending:
        for root in roots_of(stage, pending.pop()):
            if bounds(stage, root) is None:
                if plan_of(root) is None:
                    return False
            elif root not in seen:
                seen.add(root)
                pending.append(source(root))
    return True
