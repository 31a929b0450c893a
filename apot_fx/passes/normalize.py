"""Normalise: functional dropout, batch norm and attention become modules with live training flags.

Tracing writes the value that ``self.training`` had into the call; a module follows
``prepared.train()`` and ``prepared.eval()``.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as functional
from torch import fx, nn

from ..graph import free_name, set_submodule, substitute
from ..nn import attend
from ..nn.fold import BATCH_NORMS
from .base import Pass
from .functionalize import is_functional
from .report import PassReport
from .stage import StageModule
from .training_flags import TRAINING_OF

DROPOUTS: dict[Any, type[nn.Module]] = {
    functional.dropout: nn.Dropout,
    functional.dropout1d: nn.Dropout1d,
    functional.dropout2d: nn.Dropout2d,
    functional.dropout3d: nn.Dropout3d,
    functional.alpha_dropout: nn.AlphaDropout,
    functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
    torch.dropout: nn.Dropout,
}


class LiveBatchNorm(nn.Module):
    """Functional batch norm whose training flag follows the model.

    Its tensors stay where the user's model keeps them and come as arguments.
    """

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps

    def forward(
        self,
        x: torch.Tensor,
        running_mean: torch.Tensor | None,
        running_var: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        use_batch = self.training or running_mean is None
        return functional.batch_norm(
            x, running_mean, running_var, weight, bias, use_batch, self.momentum, self.eps
        )


class LiveAttention(nn.Module):
    """Scaled dot product attention whose dropout follows the model."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        is_causal: bool,
    ) -> torch.Tensor:
        return attend(query, key, value, mask, dropout, is_causal, self.training)


class Normalize(Pass):
    """Rebuild calls that hold a ``self.training`` as modules of the flag's owner."""

    name = "normalize"
    requires = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        for node in list(stage.graph.nodes):
            if node.target is functional.batch_norm and _became_its_owner(stage, node):
                report.change(node, f"{node.target}: functional batch norm is that module's")
                node.meta.pop(TRAINING_OF, None)
                continue
            owner = node.meta.pop(TRAINING_OF, None)
            if owner is None:
                continue
            if node.target in DROPOUTS:
                _dropout(stage, node, owner)
                report.change(node, f"{owner or 'root'}: functional dropout became a module")
            elif node.target is functional.batch_norm:
                _batch_norm(stage, node, owner)
                report.change(node, f"{owner or 'root'}: functional batch norm became a module")
            elif node.target is attend:
                _attention(stage, node, owner)
                report.change(node, f"{owner or 'root'}: attention with dropout became a module")
            else:
                report.leave(node, "self.training fixed at the value it had while tracing")


def _became_its_owner(stage: StageModule, node: fx.Node) -> bool:
    """Whether the call could become one of the batch norm whose tensors it reads.

    Subclasses that do more in their forward (timm's add the activation) have been traced into; what
    is left of theirs is torch's batch norm, live again, and it may be folded.
    """
    bound = _bind(node)
    keys = ("running_mean", "running_var", "weight", "bias")
    tensors = {key: bound[key] for key in keys if bound[key] is not None}
    paths = {
        str(value.target).rpartition(".")[0] if isinstance(value, fx.Node) else None
        for value in tensors.values()
    }
    path = paths.pop() if len(paths) == 1 else None
    owner = stage.get_submodule(path) if path else None
    kind = next((k for k in BATCH_NORMS if isinstance(owner, k)), None)
    if kind is None or not isinstance(owner, kind) or int(bound["training"]):
        return False
    own = all(getattr(value, "target", "") == f"{path}.{key}" for key, value in tensors.items())
    same = bound["eps"] == owner.eps and bound["momentum"] in (owner.momentum, 0.0)
    used = any(n.op == "call_module" and n.target == path for n in stage.graph.nodes)
    complete = all((key in tensors) == (getattr(owner, key) is not None) for key in keys)
    if not (own and same and complete) or (used and type(owner) is not kind):
        return False
    if type(owner) is not kind:
        norm = kind.__new__(kind)
        norm.__dict__.update(owner.__dict__)
        substitute([stage], {id(owner): norm})
    assert path is not None
    node.op, node.target, node.args, node.kwargs = "call_module", path, (bound["input"],), {}
    return True


def _dropout(stage: StageModule, node: fx.Node, owner: str) -> None:
    bound = _bind(node)
    module = DROPOUTS[node.target](p=float(bound["p"]))
    _call(stage, node, owner, "functional_dropout", module, (bound["input"],))


def _batch_norm(stage: StageModule, node: fx.Node, owner: str) -> None:
    bound = _bind(node)
    module = LiveBatchNorm(bound["momentum"], bound["eps"])
    keys = ("input", "running_mean", "running_var", "weight", "bias")
    arguments = tuple(bound[key] for key in keys)
    _call(stage, node, owner, "functional_batch_norm", module, arguments)


def _attention(stage: StageModule, node: fx.Node, owner: str) -> None:
    bound = _bind(node)
    keys = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    arguments = tuple(bound[key] for key in keys)
    _call(stage, node, owner, "functional_attention", LiveAttention(), arguments)


def _bind(node: fx.Node) -> dict[str, Any]:
    """A functional call's arguments by name, defaults filled in."""
    target = functional.dropout if node.target is torch.dropout else node.target
    assert callable(target)
    bound = inspect.signature(target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _call(
    stage: StageModule,
    node: fx.Node,
    owner: str,
    stem: str,
    module: nn.Module,
    args: tuple[Any, ...],
) -> None:
    """Turn a node into a call of a new module registered at the flag's owner."""
    parent = stage.get_submodule(owner)
    prefix = f"{owner}." if owner else ""
    name = prefix + free_name(parent, stem)
    set_submodule(stage, name, module.train(parent.training))
    node.op, node.target, node.args, node.kwargs = "call_module", name, args, {}
