"""Tied layers across a whole model: which share a weight, a fake-quant, a packed tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ..config import QConfigMapping
from ..fake_quant import FakeQuantize
from ..graph import called_module, module_calls, substitute
from ..nn import (
    ConvertedWeighted,
    LinearProduct,
    PreparedFunctional,
    PreparedLayer,
    PreparedWeighted,
    TransposedProduct,
)
from ..passes.annotate import OuterLayers, has_weights, resolve
from ..passes.stage import StageModule
from ..passes.tied import Member, weight_of
from ..passes.tree import joined, stages
from ..tensor import ApotTensor
from .capture import Captured, Ends


def tied_layers(
    model: nn.Module, found: Captured, mapping: QConfigMapping
) -> dict[int, list[Member]]:
    """The layers of a captured model that are registered with one Parameter, by its ``id``."""
    groups: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        weight = dict(module._parameters.items()).get("weight")  # scripted ones have no get
        if weight is not None and has_weights(module):
            groups.setdefault(id(weight), []).append(module)
    groups = {key: layers for key, layers in groups.items() if len(layers) > 1}
    if not groups:
        return {}
    places = _places(found)
    return {
        key: [
            resolve(mapping, places[id(layer)][0], layer, places[id(layer)][1])
            for layer in layers
            if id(layer) in places
        ]
        for key, layers in groups.items()
    }


def _places(found: Captured) -> dict[int, tuple[str, Ends]]:
    """Path and ends of every layer that is called, by the layer's ``id``."""
    places = {id(layer): (path, found.ends[path]) for path, layer in found.layers.items()}
    for path, stage in found.stages.items():
        outer = OuterLayers(stage)
        for layer, nodes in _calls(stage):
            name = joined(path, str(nodes[0].target))
            places.setdefault(id(layer), (name, outer.of(nodes, found.ends[path])))
    return places


def _calls(stage: StageModule) -> Iterator[tuple[nn.Module, list[fx.Node]]]:
    for nodes in module_calls(stage.graph).values():
        layer = called_module(stage, nodes[0])
        if layer is not None:
            yield layer, nodes


@dataclasses.dataclass(frozen=True)
class _Rows:
    """What must agree for two layers to have the same rows on the same grid."""

    weight: int
    spec: Any
    layout: Any


def share_fake_quants(prepared: nn.Module) -> None:
    """Let tied layers with one spec have one weight fake-quant: they learn one α."""
    first: dict[_Rows, PreparedWeighted] = {}
    for layer, weight, turned in _weights(prepared):
        rows = _Rows(id(weight), layer.weight_fake_quant.spec, _layout(layer, turned))
        layer.weight_fake_quant = first.setdefault(rows, layer).weight_fake_quant


def _weights(prepared: nn.Module) -> Iterator[tuple[PreparedWeighted, nn.Parameter, bool]]:
    for module in prepared.modules():
        if not isinstance(module, PreparedWeighted) or isinstance(module, PreparedFunctional):
            continue
        weight = dict(module._parameters.items()).get("weight")  # scripted ones have no get
        if weight is not None:
            yield module, weight, False
    for stage in stages(prepared).values():
        for layer, nodes in _calls(stage):
            if isinstance(layer, PreparedFunctional):
                weight, turned = weight_of(stage, layer, nodes)
                if weight is not None:
                    yield layer, weight, turned


def _layout(layer: PreparedWeighted, turned: bool) -> Any:
    product = layer.product if isinstance(layer, PreparedLayer) else None
    if isinstance(product, TransposedProduct):
        return product.groups
    return turned != (isinstance(product, LinearProduct) and product.transposed)


def shared_fake_quants(prepared: nn.Module) -> list[list[str]]:
    """Paths of the layers that share their weight's fake-quant."""
    paths: dict[FakeQuantize, list[str]] = {}
    for path, module in prepared.named_modules():
        if isinstance(module, PreparedWeighted):
            paths.setdefault(module.weight_fake_quant, []).append(path)
    return [group for group in paths.values() if len(group) > 1]


def share_packed(converted: nn.Module, groups: list[list[str]]) -> None:
    """Let the layers of each group have one packed weight, where it holds the same bits."""
    new: dict[int, nn.Module] = {}
    for paths in groups:
        layers = [converted.get_submodule(path) for path in paths]
        weights = [layer.weight for layer in layers if isinstance(layer, ConvertedWeighted)]
        new.update({id(other): weights[0] for other in weights if _same(weights[0], other)})
    substitute([converted], new)


def _same(one: ApotTensor, other: ApotTensor) -> bool:
    return torch.equal(one.packed, other.packed) and torch.equal(one.alpha, other.alpha)
