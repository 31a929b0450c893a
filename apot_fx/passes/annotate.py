"""Annotate: the only place of policy. Every layer gets a plan, or a reason why it stays float."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import fx, nn

from ..config import ActivationSpec, QConfig, QConfigMapping, WeightSpec
from ..graph import called_module, value_kind
from ..nn import PREPARED, RECURRENT, STANDALONE, FunctionalLayer, PreparedOp, has_hooks
from .base import Pass
from .functionalize import is_functional
from .report import PassReport
from .stage import StageModule, set_info
from .tree import joined

PLAN = "apot_plan"
#: ``node.meta`` key: the QConfig of a layer that owns its quantizers.
STANDALONE_CONFIG = "apot_standalone"

#: The reason reported for a layer that the mapping gives no QConfig.
LEFT_BY_CONFIG = "the config leaves it in float"
#: The reason reported for a layer that no call in the graph reaches.
NEVER_CALLED = "never called in the graph"

#: Layers with weights that a config may name; those without a prepared form stay float.
WITH_WEIGHTS = (
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

    ``activation`` is None where the layer is weight-only, ``weight`` for adds, pools, products.
    ``apart``: several inputs each have an α of their own; else they share one.
    """

    weight: WeightSpec | None
    activation: ActivationSpec | None
    apart: bool = False


def plan_of(node: fx.Node) -> LayerPlan | None:
    """The plan that annotate gave a node, if any."""
    plan = node.meta.get(PLAN)
    return plan if isinstance(plan, LayerPlan) else None


@dataclasses.dataclass(frozen=True)
class Annotate(Pass):
    """Ask the mapping for every layer and write the answer on the layer's calls.

    Args:
        mapping: the policy.
        path: the stage's own path in the model.
        ends: whether its inputs and its outputs are the model's.
    """

    mapping: QConfigMapping
    path: str = ""
    ends: tuple[bool, bool] = (True, True)

    name = "annotate"
    requires = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        calls = _layer_calls(stage)
        outer = OuterLayers(stage)
        for name, nodes in calls.items():
            layer = stage.get_submodule(name)
            config = resolve(
                self.mapping, joined(self.path, name), layer, outer.of(nodes, self.ends)
            )
            reason = _why_float(stage, layer, nodes, config)
            for node in nodes:
                set_info(node, layer=name, reason=reason)
                if reason or config is None or config.weight is None:
                    continue
                if type(layer) in RECURRENT or has_hooks(layer):
                    node.meta[STANDALONE_CONFIG] = config
                else:
                    node.meta[PLAN] = LayerPlan(config.weight, config.activation)
            if reason:
                report.leave(name, reason)
            else:
                report.change(name, describe_config(config))
        for name in sorted(_never_called(stage, calls)):
            report.leave(name, why_no_form(stage.get_submodule(name)) or NEVER_CALLED)


def resolve(
    mapping: QConfigMapping, name: str, layer: nn.Module, ends: tuple[bool, bool]
) -> QConfig | None:
    """A layer's QConfig; recurrent layers keep float activations unless they are named."""
    kinds = getattr(layer, "stands_for", (type(layer),))
    config = mapping.resolve(name, kinds, first=ends[0], last=ends[1])
    if type(layer) in RECURRENT and config is not None and not mapping.names_layer(name, kinds):
        return dataclasses.replace(config, activation=None)
    return config


def _layer_calls(stage: StageModule) -> dict[str, list[fx.Node]]:
    """Call nodes of every layer with weights, by the layer's name, in graph order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in stage.graph.nodes:
        layer = called_module(stage, node)
        if isinstance(layer, WITH_WEIGHTS) and not isinstance(layer, PreparedOp):
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _never_called(stage: StageModule, calls: Iterable[str]) -> set[str]:
    """Layers that no call in the graph reaches; those inside of leaves are not the graph's."""
    called = {id(stage.get_submodule(name)) for name in calls}
    inside = tuple(f"{leaf}." for leaf in stage.apot.opaque)
    return {
        name
        for name, module in stage.named_modules()
        if isinstance(module, WITH_WEIGHTS)
        and not isinstance(module, PreparedOp)
        and id(module) not in called
        and not name.startswith(inside)
        and name not in stage.apot.opaque
    }


def _why_float(
    stage: StageModule, layer: nn.Module, nodes: list[fx.Node], config: QConfig | None
) -> str:
    if why := why_no_form(layer):
        return why
    if config is None or config.weight is None:
        return LEFT_BY_CONFIG
    if any(node.meta.get("pinned") for node in nodes):
        return "it reads or writes a tensor that is mutated in place"
    if type(layer) in RECURRENT:
        return ""
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


def why_no_form(layer: nn.Module) -> str:
    """Why a layer has no quantized form at all; ``""`` where it has."""
    if type(layer) in PREPARED or type(layer) in RECURRENT:
        return ""
    base = next((kind.__name__ for kind in STANDALONE if isinstance(layer, kind)), "")
    if base:
        return f"{type(layer).__name__} (subclass of {base}) may compute something else"
    return f"{type(layer).__name__} has no quantized form"


def describe_config(config: QConfig | None) -> str:
    assert config is not None and config.weight is not None
    activation = config.activation
    return f"weight {config.weight.describe()}; input " + (
        "float" if activation is None else activation.describe()
    )


class OuterLayers:
    """Layers fed by a placeholder, or reaching an output, through no other quantizable layer.

    A leaf that is left in one piece counts as a layer: what is inside of it is asked for there.
    """

    def __init__(self, stage: StageModule) -> None:
        self.first: set[fx.Node] = set()
        self.last: set[fx.Node] = set()
        nodes = list(stage.graph.nodes)
        layers = {node for node in nodes if _is_layer(stage, node)}
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

    def of(self, nodes: Iterable[fx.Node], ends: tuple[bool, bool]) -> tuple[bool, bool]:
        """Whether a layer called at these nodes is a first one, and a last one."""
        calls = set(nodes)
        return ends[0] and bool(calls & self.first), ends[1] and bool(calls & self.last)


def _is_layer(stage: StageModule, node: fx.Node) -> bool:
    module = called_module(stage, node)
    if module is None:
        return False
    if str(node.target) in stage.apot.opaque:
        return any(isinstance(part, WITH_WEIGHTS) for part in module.modules())
    return isinstance(module, PreparedOp) or type(module) in STANDALONE | {FunctionalLayer}
