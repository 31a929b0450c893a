"""Annotate: the only place of policy. Every layer gets a plan, or a reason why it stays float."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import fx, nn

from ..config import ActivationSpec, QConfig, QConfigMapping, WeightSpec
from ..graph import HOLDS, called_module, value_kind
from ..nn import (
    EMBEDDINGS,
    RECURRENT,
    STANDALONE,
    TRANSPOSED,
    ConvertedOp,
    Expanded,
    FunctionalLayer,
    PreparedOp,
    has_hooks,
    is_conv1d,
    is_standalone_type,
    prepared_type,
)
from .base import Pass
from .functionalize import is_functional
from .opaque_call import Record
from .report import PassReport
from .stage import StageModule, set_info
from .tied import Groups, Member, settle, weight_of, with_others
from .tree import joined

PLAN = "apot_plan"
#: ``node.meta`` key: the QConfig of a layer that owns its quantizers.
STANDALONE_CONFIG = "apot_standalone"

#: The reason reported for a layer that the mapping gives no QConfig.
LEFT_BY_CONFIG = "the config leaves it in float"
#: The reason reported for a layer that no call in the graph reaches.
NEVER_CALLED = "never called in the graph"
#: The reason reported for an embedding that the mapping does not name.
ON_REQUEST = "the config leaves it in float: embeddings are quantized on request only"

#: Layers with weights that a config may name; those without a prepared form stay float.
_WITH_WEIGHTS = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.Bilinear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    FunctionalLayer,
)


def has_weights(module: nn.Module) -> bool:
    """Whether a module is a layer that a config may name."""
    if isinstance(module, (Expanded, StageModule)):
        return False  # the layers are inside
    return isinstance(module, _WITH_WEIGHTS) or any(map(is_conv1d, type(module).__mro__))


def is_computed_inside(layer: nn.Module) -> bool:
    """Whether functional layers that took a layer's weight are registered below it."""
    kinds = (FunctionalLayer, PreparedOp, ConvertedOp)
    return any(isinstance(child, kinds) for child in layer.children())


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
        tied: the model's layers that share a weight, as far as they are registered.
    """

    mapping: QConfigMapping
    path: str = ""
    ends: tuple[bool, bool] = (True, True)
    tied: Groups = dataclasses.field(default_factory=dict)

    name = "annotate"
    requires = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        calls = _layer_calls(stage)
        for name, (config, reason) in self._choices(stage, calls).items():
            layer = stage.get_submodule(name)
            alone = _is_standalone(layer, calls[name])
            for node in calls[name]:
                set_info(node, layer=name, reason=reason)
                if reason or config is None or config.weight is None:
                    continue
                if alone:
                    node.meta[STANDALONE_CONFIG] = config
                else:
                    node.meta[PLAN] = LayerPlan(config.weight, config.activation)
            if reason:
                report.leave(name, reason)
            else:
                report.change(name, describe_config(config))
        for name in sorted(_never_called(stage, calls)):
            report.leave(name, why_no_form(stage.get_submodule(name)) or NEVER_CALLED)

    def _choices(
        self, stage: StageModule, calls: dict[str, list[fx.Node]]
    ) -> dict[str, tuple[QConfig | None, str]]:
        """Every layer's QConfig, and why it stays in float; tied layers agree."""
        outer = OuterLayers(stage)
        choices: dict[str, tuple[QConfig | None, str]] = {}
        groups: dict[int, list[Member]] = {}
        names: dict[str, str] = {}
        for name, nodes in calls.items():
            layer = stage.get_submodule(name)
            member = resolve(
                self.mapping, joined(self.path, name), layer, outer.of(nodes, self.ends)
            )
            reason = member.reason or _why_float_here(layer, nodes)
            choices[name] = member.config, reason
            names[member.name] = name
            weight, _ = weight_of(stage, layer, nodes)
            if weight is not None:
                found = dataclasses.replace(member, reason=reason)
                groups.setdefault(id(weight), []).append(found)
        for weight_id, own in groups.items():
            members = with_others(own, self.tied.get(weight_id, ()))
            for full, choice in settle(members).items() if len(members) > 1 else ():
                if full in names:
                    choices[names[full]] = choice
        return choices


def resolve(
    mapping: QConfigMapping, name: str, layer: nn.Module, ends: tuple[bool, bool]
) -> Member:
    """A layer's QConfig, or why it stays in float.

    Recurrent layers keep float activations unless they are named. Embeddings have none, and stay
    in float unless they are named.
    """
    kinds = getattr(layer, "stands_for", (type(layer),))
    config = mapping.resolve(name, kinds, first=ends[0], last=ends[1])
    named = mapping.names_layer(name, kinds)
    embedding = type(layer) in EMBEDDINGS
    reason = why_no_form(layer)
    if embedding and not named:
        config, reason = None, reason or ON_REQUEST
    if config is None or config.weight is None:
        return Member(name, layer, None, named, reason or LEFT_BY_CONFIG)
    if embedding or (type(layer) in RECURRENT and not named):
        config = dataclasses.replace(config, activation=None)
    return Member(name, layer, config, named, reason)


def _layer_calls(stage: StageModule) -> dict[str, list[fx.Node]]:
    """Call nodes of every layer with weights, by the layer's name, in graph order."""
    calls: dict[str, list[fx.Node]] = {}
    for node in stage.graph.nodes:
        layer = called_module(stage, node)
        if layer is not None and has_weights(layer) and not isinstance(layer, PreparedOp):
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _never_called(stage: StageModule, calls: Iterable[str]) -> set[str]:
    """Layers that no call in the graph reaches; those inside of leaves are not the graph's."""
    called = {id(stage.get_submodule(name)) for name in calls}
    inside = tuple(f"{leaf}." for leaf in stage.apot.opaque)
    return {
        name
        for name, module in stage.named_modules()
        if has_weights(module)
        and not isinstance(module, PreparedOp)
        and not is_computed_inside(module)
        and id(module) not in called
        and not name.startswith(inside)
        and name not in stage.apot.opaque
    }


def _is_standalone(layer: nn.Module, nodes: list[fx.Node]) -> bool:
    """Whether a layer in the graph owns its quantizers and is called as ever."""
    sized = type(layer) in TRANSPOSED and any(map(_is_sized, nodes))
    return type(layer) in RECURRENT or type(layer) in EMBEDDINGS or sized or has_hooks(layer)


def _is_sized(node: fx.Node) -> bool:
    """Whether a call of a transposed convolution brings an output size."""
    return len(node.args) == 2 or "output_size" in node.kwargs


def _why_float_here(layer: nn.Module, nodes: list[fx.Node]) -> str:
    """What forbids it in a graph to quantize a layer."""
    if any(node.meta.get("pinned") for node in nodes):
        return "it reads or writes a tensor that is mutated in place"
    if type(layer) in RECURRENT or type(layer) in EMBEDDINGS:
        return ""
    takes = 5 if isinstance(layer, FunctionalLayer) else 1
    fed = all(
        (len(node.args) == takes and not node.kwargs)
        or (type(layer) in TRANSPOSED and len(node.args) in (1, 2) and _is_sized(node))
        for node in nodes
    )
    inputs = [node.args[0] for node in nodes] if fed else []
    if not fed or any(not isinstance(x, fx.Node) or value_kind(x) != "tensor" for x in inputs):
        return "it is not called with one tensor"
    return ""


def why_no_form(layer: nn.Module) -> str:
    """Why a layer has no quantized form at all; ``""`` where it has."""
    if "forward" in layer.__dict__:
        return "its forward is replaced on the instance"
    if type(layer) in EMBEDDINGS and layer.max_norm is not None:
        return "max_norm writes into its weight in forward"
    if prepared_type(type(layer)) or type(layer) in RECURRENT or type(layer) in EMBEDDINGS:
        real = all(parameter.is_floating_point() for parameter in layer.parameters())
        return "" if real else "its weight is not real floating point"
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

    Embeddings, quantized on request only, count as none of them. A leaf that is left in one piece
    counts as a layer: what is inside of it is asked for there.
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
                elif value_kind(node) != "other" or node.meta.get(HOLDS):
                    fed.add(node)
        reaching: set[fx.Node] = set()
        for node in reversed(nodes):
            if node.op == "output" or any(user in reaching for user in node.users):
                if node in layers:
                    self.last.add(node)
                elif node.op == "output" or value_kind(node) != "other" or _is_result(node):
                    reaching.add(node)

    def of(self, nodes: Iterable[fx.Node], ends: tuple[bool, bool]) -> tuple[bool, bool]:
        """Whether a layer called at these nodes is a first one, and a last one."""
        calls = set(nodes)
        return ends[0] and bool(calls & self.first), ends[1] and bool(calls & self.last)


def _is_result(node: fx.Node) -> bool:
    """Whether a node is the object of a user's class that the model returns; not what lies deeper
    in it, such as a cache of keys and values."""
    return isinstance(node.target, Record) and any(user.op == "output" for user in node.users)


def _is_layer(stage: StageModule, node: fx.Node) -> bool:
    module = called_module(stage, node)
    if module is None:
        return False
    if str(node.target) in stage.apot.opaque:
        return any(map(has_weights, module.modules()))
    kind = type(module)
    layer = is_standalone_type(kind) or kind is FunctionalLayer
    return isinstance(module, PreparedOp) or (layer and kind not in EMBEDDINGS)
