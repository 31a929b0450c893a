"""Annotate: the only place of policy. Every layer gets a plan, or a reason why it stays float."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import fx, nn

from ..config import ActivationSpec, QConfig, QConfigMapping, WeightSpec
from ..graph import called_module, value_kind
from ..nn import PREPARED, FunctionalLayer
from .base import Pass
from .functionalize import is_functional
from .report import PassReport
from .stage import StageModule, set_info

PLAN = "apot_plan"

#: The reason reported for a layer that no call in the graph reaches.
NEVER_CALLED = "never called in the graph"

#: Layers with weights that a config may name; those outside PREPARED stay float with a reason.
_WITH_WEIGHTS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.MultiheadAttention,
    FunctionalLayer,
)


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """How one call of a layer is quantized (``node.meta["apot_plan"]``).

    ``activation`` is None where the layer is weight-only, ``weight`` for adds and pools.
    """

    weight: WeightSpec | None
    activation: ActivationSpec | None


def plan_of(node: fx.Node) -> LayerPlan | None:
    """The plan that annotate gave a node, if any."""
    plan = node.meta.get(PLAN)
    return plan if isinstance(plan, LayerPlan) else None


@dataclasses.dataclass(frozen=True)
class Annotate(Pass):
    """Ask the mapping for every layer and write the answer on the layer's calls."""

    mapping: QConfigMapping

    name = "annotate"
    requires = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        calls = _layer_calls(stage)
        never_called = sorted(_never_called(stage, calls))
        self.mapping.check_names([*calls, *never_called])
        outer = _OuterLayers(stage)
        for name, nodes in calls.items():
            layer = stage.get_submodule(name)
            config = self.mapping.resolve(
                name,
                getattr(layer, "stands_for", type(layer)),
                first=any(node in outer.first for node in nodes),
                last=any(node in outer.last for node in nodes),
            )
            reason = _why_float(stage, layer, nodes, config)
            for node in nodes:
                if reason or config is None or config.weight is None:
                    set_info(node, layer=name, reason=reason)
                else:
                    node.meta[PLAN] = LayerPlan(config.weight, config.activation)
                    set_info(node, layer=name)
            if reason:
                report.leave(name, reason)
            else:
                report.change(name, _describe(config))
        for name in never_called:
            report.leave(name, _subclass(stage.get_submodule(name)) or NEVER_CALLED)


def _layer_calls(stage: StageModule) -> dict[str, list[fx.Node]]:
    """Call nodes of every layer with weights, by the layer's name, in graph order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in stage.graph.nodes:
        if isinstance(called_module(stage, node), _WITH_WEIGHTS):
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _never_called(stage: StageModule, calls: Iterable[str]) -> set[str]:
    called = {id(stage.get_submodule(name)) for name in calls}
    return {
        name
        for name, module in stage.named_modules()
        if isinstance(module, _WITH_WEIGHTS) and id(module) not in called
    }


def _why_float(
    stage: StageModule, layer: nn.Module, nodes: list[fx.Node], config: QConfig | None
) -> str:
    if type(layer) not in PREPARED:
        return _subclass(layer) or f"{type(layer).__name__} has no quantized form"
    if config is None or config.weight is None:
        return "the config leaves it in float"
    if any(node.meta.get("pinned") for node in nodes):
        return "it reads or writes a tensor that is mutated in place"
    takes = 5 if isinstance(layer, FunctionalLayer) else 1
    fed = all(
        len(node.args) == takes and not node.kwargs and isinstance(node.args[0], fx.Node)
        for node in nodes
    )
    if not fed or any(value_kind(node.args[0]) != "tensor" for node in nodes):  # type: ignore[arg-type]
        return "it is not called with one tensor"
    if any(not parameter.is_floating_point() for parameter in layer.parameters()):
        return "its weight is not real floating point"
    return ""


def _subclass(layer: nn.Module) -> str:
    """The reason for a user's own kind of a layer, else ``""``."""
    base = next((kind.__name__ for kind in PREPARED if isinstance(layer, kind)), "")
    own = base and type(layer) not in PREPARED
    return f"{type(layer).__name__} (subclass of {base}) may compute something else" if own else ""


def _describe(config: QConfig | None) -> str:
    assert config is not None and config.weight is not None
    activation = config.activation
    return f"weight {config.weight.describe()}; input " + (
        "float" if activation is None else activation.describe()
    )


class _OuterLayers:
    """Layers fed by a placeholder, or reaching an output, through no other quantizable layer."""

    def __init__(self, stage: StageModule) -> None:
        self.first: set[fx.Node] = set()
        self.last: set[fx.Node] = set()
        nodes = list(stage.graph.nodes)
        layers = {node for node in nodes if type(called_module(stage, node)) in PREPARED}
        fed: set[fx.Node] = set()
        for node in nodes:
            if node.op == "placeholder" or any(source in fed for source in node.all_input_nodes):
                if node in layers:
                    self.first.add(node)
                elif value_kind(node) != "other":
                    fed.add(node)
        reaching: set[fx.Node] = set()
        for node in reversed(nodes):
            if node.op == "output" or any(user in reaching for user in node.users):
                if node in layers:
                    self.last.add(node)
                elif node.op == "output" or value_kind(node) != "other":
                    reaching.add(node)
