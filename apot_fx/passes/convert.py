"""Convert, node by node: fake-quant → quantize, index op → index form, layer → integer layer."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import fx, nn

from ..fake_quant import FakeQuantize
from ..graph import (
    argument,
    called_module,
    called_name,
    free_name,
    module_aliases,
    prune,
    reads_metadata,
    replace_argument,
    set_submodule,
)
from ..levels import LevelSet
from ..nn import (
    CONVERTED,
    ConvertedLayer,
    ConvertedOp,
    PreparedOp,
    Quantize,
    ThroughFloat,
    keep_children,
)
from .base import Pass
from .functional_layers import computed_operands
from .grammar import is_converted, is_hoisted, is_prepared
from .index_ops import DROPOUT_MODULES, FLOAT_ONLY, bounds, index_op
from .insert import ACTIVATION
from .report import PassReport
from .stage import NodeInfo, StageModule, info, set_info

QUANTIZE = "quantize_"


class DropDropout(Pass):
    """A converted model only evaluates: dropout modules are identities and go."""

    name = "drop_dropout"
    requires = (is_hoisted,)
    ensures = (is_prepared,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        for node in list(stage.graph.nodes):
            if isinstance(called_module(stage, node), DROPOUT_MODULES):
                node.replace_all_uses_with(node.args[0])
                stage.graph.erase_node(node)
                report.change(node, "dropout removed")


class ConvertActivations(Pass):
    """Fake-quants become quantizers and the index ops between them and a layer run on indices.

    A quantizer that reads a layer through nothing but clamps is still a call of its own here;
    :class:`ConvertLayers` moves it into the layer.
    """

    name = "convert_activations"
    requires = (is_hoisted,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        for node in list(stage.graph.nodes):
            grid = info(node).quantizer
            if not grid:
                continue
            quantizer = _quantizer(stage, grid)
            set_info(node, quantizer=quantizer)
            if isinstance(called_module(stage, node), FakeQuantize):
                _replace_call(node, quantizer)
                report.change(quantizer, f"made of {grid}")
            else:
                module = stage.get_submodule(quantizer)
                assert isinstance(module, Quantize)
                _on_indices(stage, node, module.level_set, report)


def _replace_call(node: fx.Node, target: str) -> None:
    """Call another module in a node's place; a new node, so that its name fits."""
    with node.graph.inserting_before(node):
        call = node.graph.call_module(target, node.args)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _quantizer(stage: StageModule, fake_quant: str) -> str:
    """Name of the quantizer that replaces a fake-quant; made on first use."""
    name = fake_quant.replace(ACTIVATION, QUANTIZE)
    if name not in stage._modules:
        module = stage.get_submodule(fake_quant)
        assert isinstance(module, FakeQuantize)
        stage.add_module(name, Quantize(module.alpha, module.known_level_set()))
    return name


def _on_indices(stage: StageModule, node: fx.Node, level_set: LevelSet, report: PassReport) -> None:
    """Give an index op the form that runs on indices, where the plain call would not do."""
    module, match = called_module(stage, node), index_op(stage, node)
    assert match is not None
    if match.kind == "zero_pad":
        zero = level_set.zero_index
        padding: Any = argument(node, 1, "pad") if module is None else module.padding
        node.op, node.target = "call_function", functional.pad
        node.args, node.kwargs = (match.inputs[0], padding, "constant", zero), {}
        report.change(node, f"pads with the zero level's index {zero}")
        return
    name = called_name(node) if module is None else type(module).__name__
    if name in FLOAT_ONLY or (match.kind == "upsample" and level_set.index_dtype == "int16"):
        call = name if module is None else module
        wrapper = free_name(stage, "through_float")
        stage.add_module(wrapper, ThroughFloat(call))
        node.op, node.target = "call_module", wrapper
        report.change(node, f"{name} on float32 of the index")


@dataclasses.dataclass(frozen=True)
class _Emission:
    """One quantizer call that a layer takes over, with the clamps in between."""

    call: fx.Node
    low: float | None
    high: float | None

    @property
    def reader(self) -> tuple[str, float | None, float | None]:
        return str(self.call.target), self.low, self.high


@dataclasses.dataclass(frozen=True)
class ConvertLayers(Pass):
    """Prepared layers become converted ones that give every reader what it wants."""

    low_memory: bool = False

    name = "convert_layers"
    ensures = (is_converted,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        emissions = _emissions(stage)
        converted: dict[tuple[Any, ...], str] = {}
        aliases = module_aliases(stage)
        norms: set[str] = set()
        floats = {source for node in stage.graph.nodes for source in _float_operands(node)}
        # Listed first: converting one call of a shared layer replaces it under its name.
        calls = [(node, called_module(stage, node)) for node in stage.graph.nodes]
        operands = _Operands(stage, [layer for _, layer in calls])
        for node, layer in calls:
            if not isinstance(layer, PreparedOp) or layer.standalone:
                continue
            weight_and_bias = operands.take(node, layer)
            grid, norm = _module_args(node)
            key = (id(layer), grid, norm)
            if key not in converted:
                module = _convert(layer, _get(stage, grid), _get(stage, norm), *weight_and_bias)
                if isinstance(module, ConvertedLayer):
                    module.weight.keep_decoded = not self.low_memory
                converted[key] = _register(stage, module, str(node.target), aliases[id(layer)])
                report.change(converted[key], f"became a {type(module).__name__}")
            if norm:
                norms.add(norm)
            name = str(node.target)
            node.target = converted[key]
            _write_readers(stage, node, emissions.get(node, []), name)
        _remove_leftovers(stage, norms)
        _remove_floats(stage, floats)


def _emissions(stage: StageModule) -> dict[fx.Node, list[_Emission]]:
    """For every layer's call, the quantizers that read it through nothing but clamps."""
    found: dict[fx.Node, list[_Emission]] = {}
    for node in stage.graph.nodes:
        if not isinstance(called_module(stage, node), Quantize):
            continue
        low, high = -math.inf, math.inf
        source = node.args[0]
        while (limits := bounds(stage, source)) is not None:
            # Clamps nearer the layer act first; these come after and limit what is left.
            low, high = (min(max(end, low), high) for end in limits)
            source = source.args[0]
        producer = called_module(stage, source)
        if isinstance(producer, PreparedOp) and not producer.standalone:
            ends = (None if math.isinf(end) else end for end in (low, high))
            found.setdefault(source, []).append(_Emission(node, *ends))
    return found


#: Name of a module, "" for none; or of several.
_Names = str | tuple[str, ...]


def _module_args(node: fx.Node) -> tuple[_Names, str]:
    """Names of the fake-quants and the batch norm in ``layer(x, fake_quant, batch_norm)``."""
    grids, norm = argument(node, 1, "fake_quant"), argument(node, 2, "batch_norm")
    several = isinstance(grids, (tuple, list))
    names = tuple(_name(grid) for grid in grids) if several else _name(grids)
    return names, _name(norm)


def _name(arg: Any) -> str:
    return str(arg.target) if isinstance(arg, fx.Node) else ""


def _convert(op: PreparedOp, *arguments: Any) -> ConvertedOp:
    converted = next(kind for prepared, kind in CONVERTED if isinstance(op, prepared))
    made: ConvertedOp = converted(op, *arguments)
    return made.train(op.training)


def _get(stage: StageModule, names: _Names) -> Any:
    if isinstance(names, tuple):
        return tuple(_get(stage, name) for name in names)
    return stage.get_submodule(names) if names else None


def _register(stage: StageModule, module: ConvertedOp, name: str, aliases: list[str]) -> str:
    """Put a converted layer where the prepared one was; another grid of it beside it."""
    first = stage.get_submodule(name)
    if isinstance(first, PreparedOp):
        keep_children(first, module)
        for alias in aliases:
            set_submodule(stage, alias, module)
        return name
    if isinstance(first, ConvertedLayer):
        module.weight = first.weight
    parent, _, leaf = name.rpartition(".")
    prefix = f"{parent}." if parent else ""
    beside = prefix + free_name(stage.get_submodule(parent), f"{leaf}_call")
    set_submodule(stage, beside, module)
    return beside


def _write_readers(
    stage: StageModule, node: fx.Node, emissions: list[_Emission], layer: str
) -> None:
    """Rewrite a layer's call to give indices to quantizers and float to whoever else reads."""
    by_reader: dict[tuple[Any, ...], list[fx.Node]] = {}
    for emission in emissions:
        by_reader.setdefault(emission.reader, []).append(emission.call)
    taken = {emission.call for emission in emissions}
    others = [user for user in node.users if not _serves(stage, user, taken)]
    wants_float = any(not reads_metadata(user) for user in others) or not emissions
    graph, own = node.graph, info(node)
    with graph.inserting_before(node):
        readers = [(graph.get_attr(quantizer), low, high) for quantizer, low, high in by_reader]
    node.args = (node.args[0], *readers, *([None] if wants_float and readers else []))
    results = _results(node, len(readers) + wants_float)
    if len(results) > 1:
        set_info(node, NodeInfo(origin=own.origin, layer=layer))
    for result, calls in zip(results, by_reader.values(), strict=False):
        set_info(result, info(calls[0]), layer=layer)
        for call in calls:
            call.replace_all_uses_with(result)
            graph.erase_node(call)
    if wants_float:
        set_info(results[-1], own, layer=layer)
    if len(results) > 1 or not wants_float:
        for user in others:
            replace_argument(user, node, results[-1])


def _serves(stage: StageModule, user: fx.Node, taken: set[fx.Node]) -> bool:
    """Whether a reader is one of the quantizers, or a clamp that only they read."""
    if user in taken:
        return True
    if bounds(stage, user) is None:
        return False
    return bool(user.users) and all(_serves(stage, reader, taken) for reader in user.users)


def _results(node: fx.Node, count: int) -> list[fx.Node]:
    """The node itself, or one getitem per member of the tuple it gives."""
    if count <= 1:
        return [node]
    results: list[fx.Node] = []
    for position in range(count):
        with node.graph.inserting_after(results[-1] if results else node):
            results.append(node.graph.call_function(operator.getitem, (node, position)))
    return results


class _Operands:
    """Computed weights and biases, taken out of the graph one call at a time.

    Kept only for layers with several calls: a model's weights need not all be held at once.
    """

    def __init__(self, stage: StageModule, called: list[nn.Module | None]) -> None:
        self.stage = stage
        counts = Counter(id(layer) for layer in called)
        self.shared = {layer for layer, count in counts.items() if count > 1}
        self.kept: dict[int, tuple[torch.Tensor | None, ...]] = {}

    def take(self, call: fx.Node, layer: nn.Module) -> tuple[torch.Tensor | None, ...]:
        found = self.kept.get(id(layer))
        if found is None:
            found = computed_operands(self.stage, call)
            if id(layer) in self.shared:
                self.kept[id(layer)] = found
        sources = [arg for arg in call.args[3:] if isinstance(arg, fx.Node)]
        call.args = call.args[:3]
        for node in sources:
            sources.extend(n for n in node.all_input_nodes if n not in sources)
            if not node.users:
                call.graph.erase_node(node)
        return found


def _float_operands(call: fx.Node) -> Iterator[str]:
    """Names of the parameters and modules that a call's own weight and bias are computed from."""
    pending = [arg for arg in call.args[3:] if isinstance(arg, fx.Node)]
    for node in pending:
        pending.extend(n for n in node.all_input_nodes if n not in pending)
        if not node.all_input_nodes:
            yield str(node.target)


def _remove_floats(stage: StageModule, names: set[str]) -> None:
    """Drop parameters (and parametrizations) whose values are packed now and that nobody reads."""
    read = {str(n.target) for n in stage.graph.nodes if n.op in ("get_attr", "call_module")}
    modules = dict(stage.named_modules(remove_duplicate=False))
    for name in names:
        parent, _, leaf = name.rpartition(".")
        above = {name[:end] for end, letter in enumerate(name) if letter == "."} & read
        owner = modules.get(parent)
        if name in read or above or owner is None or isinstance(owner, ConvertedOp):
            continue
        for registry in (owner._parameters, owner._buffers, owner._modules):
            registry.pop(leaf, None)


def _remove_leftovers(stage: StageModule, norms: set[str]) -> None:
    """Drop dead nodes, fake-quants, and batch norms that now live in a layer's s and b."""
    prune(stage)
    used = {str(node.target) for node in stage.graph.nodes if node.op == "call_module"}
    referenced = {id(stage.get_submodule(name)) for name in used}
    for name, module in list(stage.named_modules(remove_duplicate=False)):
        folded = name in norms and id(module) not in referenced
        if isinstance(module, FakeQuantize) or folded:
            parent, _, leaf = name.rpartition(".")
            del stage.get_submodule(parent)._modules[leaf]
