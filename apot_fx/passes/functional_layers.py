"""Functional layers: ``F.linear`` and ``F.conv…`` on weights that hang on parameters alone.

They become modules, so that all that follows knows one kind of layer. The weight's own computation
(a slice of a packed parameter, a parametrization, a transpose) stays in the graph and comes as an
argument: parameters keep their names, and training goes through it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as functional
from torch import fx, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..graph import (
    CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    argument,
    called_module,
    constant_value,
    free_name,
    set_submodule,
)
from ..nn import (
    ConvProduct,
    FunctionalLayer,
    LeftProduct,
    LinearProduct,
    PreparedFunctional,
    Product,
    TransposedProduct,
)
from .base import Pass
from .functionalize import is_functional
from .report import PassReport
from .stage import StageModule, info, next_id, set_info
from .training_flags import TRAINING_OF

_MATMULS = (torch.matmul, torch.mm, operator.matmul, "matmul", "mm", "__matmul__")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_LAYERS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

#: Attributes that a module needs for itself once it is a layer.
_OWN = (set(dir(PreparedFunctional)) | {"geometry", "stands_for", "weight_shape"}) - set(
    dir(nn.Module)
)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a functional call computes: ``x`` with ``weight`` (transposed first, if so) and bias."""

    x: fx.Node
    weight: fx.Node
    bias: Any
    transposed: bool
    product: Callable[[torch.Tensor], Product]
    rank: int  # of the weight


class FunctionalLayers(Pass):
    """Turn functional calls with constant weights into calls of :class:`FunctionalLayer`."""

    name = "functional_layers"
    requires = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        constant = constants(stage)
        found: list[tuple[fx.Node, _Call, torch.Tensor]] = []
        for node in stage.graph.nodes:
            call = _match(node, constant)
            if call is None or node in constant or node.meta.get("pinned"):
                continue
            if not _is_constant(call.weight, constant) or not _is_constant(call.bias, constant):
                continue
            weight = constant_value(stage, call.weight)
            if weight.dim() == call.rank and weight.is_floating_point():
                found.append((node, call, weight))
        names = _Names(stage, [call.weight for _, call, _ in found])
        for node, call, weight in found:
            name = names.of(node, call, call.product(weight))
            _rewrite(node, call, name)
            report.change(node, f"{name}: became a layer")


def computed_operands(stage: StageModule, call: fx.Node) -> tuple[torch.Tensor | None, ...]:
    """Weight and bias that a layer's call brings along, their values now; else ``()``."""
    return tuple(
        constant_value(stage, arg) if isinstance(arg, fx.Node) else None for arg in call.args[3:]
    )


def _rewrite(node: fx.Node, call: _Call, name: str) -> None:
    weight = call.weight
    if call.transposed:
        with node.graph.inserting_before(node):
            weight = node.graph.call_method("t", (weight,))
        set_info(weight, info(node), id=next_id(node.graph))
    node.op, node.target = "call_module", name
    node.args, node.kwargs = (call.x, None, None, weight, call.bias), {}


def _match(node: fx.Node, constant: set[fx.Node]) -> _Call | None:
    """The functional layer that a node calls, weight unchecked; None for any other node."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is functional.linear:
        keys = ("input", "weight", "bias")
        x, weight, bias = (argument(node, place, key) for place, key in enumerate(keys))
        return _call(x, weight, bias, False, _linear, 2)
    if node.target in CONVOLUTIONS:
        return _match_conv(node, CONVOLUTIONS[node.target])
    if node.target in TRANSPOSED_CONVOLUTIONS:
        return _match_transposed(node, TRANSPOSED_CONVOLUTIONS[node.target])
    if node.target in (torch.addmm, "addmm"):
        plain = all(node.kwargs.get(key, 1) == 1 for key in ("beta", "alpha"))
        keys = ("input", "mat1", "mat2")
        bias, x, weight = (argument(node, place, key) for place, key in enumerate(keys))
        return _call(x, weight, bias, True, _linear, 2) if plain else None
    if node.target in _MATMULS:
        left, right = (
            argument(node, 0, "input"),
            argument(node, 1, "other", node.kwargs.get("mat2")),
        )
        if left in constant:
            return _call(right, left, None, False, _left, 2)
        return _call(left, right, None, True, _linear, 2)
    return None


def _left(weight: torch.Tensor) -> Product:
    return LeftProduct()


def _linear(weight: torch.Tensor) -> Product:
    return LinearProduct()


def _match_conv(node: fx.Node, rank: int) -> _Call | None:
    keys = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    defaults = (None, None, None, 1, 0, 1, 1)
    x, weight, bias, *geometry = (
        argument(node, place, key, default)
        for place, (key, default) in enumerate(zip(keys, defaults, strict=True))
    )
    stride, padding, dilation, groups = geometry
    if not {x, weight, bias}.issuperset(node.all_input_nodes):
        return None  # traced geometry

    def product(weight: torch.Tensor) -> Product:
        kernel = weight.shape[2:]
        return ConvProduct.of_call(rank, stride, padding, dilation, groups, kernel)

    return _call(x, weight, bias, False, product, rank + 2)


def _match_transposed(node: fx.Node, rank: int) -> _Call | None:
    keys = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    defaults = (None, None, None, 1, 0, 0, 1, 1)
    x, weight, bias, *geometry = (
        argument(node, place, key, default)
        for place, (key, default) in enumerate(zip(keys, defaults, strict=True))
    )
    if not {x, weight, bias}.issuperset(node.all_input_nodes):
        return None  # traced geometry

    def product(weight: torch.Tensor) -> Product:
        return TransposedProduct.of_call(rank, *geometry)

    return _call(x, weight, bias, False, product, rank + 2)


def _call(x: Any, weight: Any, *rest: Any) -> _Call | None:
    both = isinstance(x, fx.Node) and isinstance(weight, fx.Node)
    return _Call(x, weight, *rest) if both else None


def constants(stage: StageModule) -> set[fx.Node]:
    """Nodes whose value hangs on parameters and buffers alone."""
    found: set[fx.Node] = set()
    for node in stage.graph.nodes:
        if TRAINING_OF in node.meta or node.meta.get("keep") or node.meta.get("pinned"):
            continue
        parametrized = isinstance(called_module(stage, node), ParametrizationList)
        inputs = node.all_input_nodes
        derived = node.op in ("call_function", "call_method") and bool(inputs)
        if node.op == "get_attr" or parametrized or (derived and all(n in found for n in inputs)):
            found.add(node)
    return found


def _is_constant(value: Any, constant: set[fx.Node]) -> bool:
    return value is None or value in constant


class _Names:
    """Where each functional layer is registered; the same computation is the same layer."""

    def __init__(self, stage: StageModule, weights: list[fx.Node]) -> None:
        self.stage = stage
        self.made: dict[Any, str] = {}
        inside = {n for weight in weights for n in _ancestors(weight)}
        nodes = stage.graph.nodes
        self.called = {str(n.target) for n in nodes if n.op == "call_module" and n not in inside}
        self.read = {str(n.target) for n in nodes if n.op == "get_attr"}
        keys = {_expression(weight): _owner(weight) for weight in weights}
        owners = list(keys.values())
        self.single = {owner for owner in owners if owners.count(owner) == 1}

    def of(self, node: fx.Node, call: _Call, product: Product) -> str:
        key = (_expression(call.weight), product, call.transposed)
        if key not in self.made:
            self.made[key] = self._make(node, call, product)
        return self.made[key]

    def _make(self, node: fx.Node, call: _Call, product: Product) -> str:
        path = _owner(call.weight)
        owner = self.stage.get_submodule(path)
        layer = FunctionalLayer()
        layer.geometry = product
        layer.stands_for = (*_classes(owner), node.target, _layer_type(product))
        name = path
        own = {str(n.target) for n in (*_ancestors(call.weight), *_ancestors(call.bias))}
        if self._may_become(path, owner, own):
            layer.__dict__.update(owner.__dict__)
        else:
            parts = (path, _stem(call.weight, owner, product))
            name = ".".join(part for part in parts if part)
        set_submodule(self.stage, name, layer.train(owner.training))
        return name

    def _may_become(self, path: str, owner: nn.Module, own: set[str]) -> bool:
        """Whether the weight's owner has no other use than this layer, which reads ``own``."""
        others = self.called | (self.read - own)
        used = any(name == path or name.startswith(f"{path}.") for name in others)
        registered = {*owner.__dict__, *owner._modules, *owner._parameters, *owner._buffers}
        return bool(path) and path in self.single and not used and not (registered & _OWN)


def _classes(owner: nn.Module) -> tuple[type, ...]:
    """What a config may call the owner; a root or container says nothing about its layers.

    Nor does an embedding about the head that uses its weight.
    """
    if isinstance(owner, (nn.Embedding, nn.EmbeddingBag, StageModule)):
        return ()
    return tuple(k for k in type(owner).__mro__ if k not in (nn.Module, object))


def _layer_type(product: Product) -> type[nn.Module]:
    if isinstance(product, TransposedProduct):
        return _TRANSPOSED_LAYERS[product.rank - 1]
    return _LAYERS[product.rank if isinstance(product, ConvProduct) else 0]


def _stem(weight: fx.Node, owner: nn.Module, product: Product) -> str:
    """``in_proj`` for a parameter ``in_proj_weight``, numbered where that is taken."""
    source = next(n for n in _ancestors(weight) if n.op != "call_method" and not n.args)
    leaf = str(source.target).rpartition(".")[2]
    stem = leaf.removesuffix("weight").rstrip("_.") or product.name
    if stem in owner._parameters or stem in owner._buffers:
        stem = f"{stem}_{product.name}"
    return stem if not hasattr(owner, stem) else free_name(owner, stem)


def _ancestors(node: Any) -> list[fx.Node]:
    """A constant's whole computation, itself first; nothing for what is no node."""
    found = [node] if isinstance(node, fx.Node) else []
    for current in found:
        found.extend(n for n in current.all_input_nodes if n not in found)
    return found


def _owner(weight: fx.Node) -> str:
    """Path of the innermost module that holds all parameters of a weight's computation."""
    sources = [n for n in _ancestors(weight) if n.op in ("get_attr", "call_module")]
    steps = zip(*(_module_of(str(n.target)) for n in sources), strict=False)
    return ".".join(step[0] for step in takewhile(lambda step: len(set(step)) == 1, steps))


def _module_of(source: str) -> list[str]:
    """``["layer", "fc"]`` of ``layer.fc.weight`` and of ``layer.fc.parametrizations.weight``."""
    path = source.split(".")
    return path[: path.index("parametrizations")] if "parametrizations" in path else path[:-1]


def _expression(node: fx.Node) -> Any:
    """A constant's computation as a value that can be compared."""
    if node.op == "get_attr":
        return node.target

    def inner(arg: Any) -> Any:
        return _expression(arg) if isinstance(arg, fx.Node) else arg

    parts = [fx.node.map_aggregate(arg, inner) for arg in (node.args, dict(node.kwargs))]
    return node.op, str(node.target), repr(parts)
