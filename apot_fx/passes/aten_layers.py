"""Layers of exported programs: from an aten call to the module that stood there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import fx, nn

from ..graph import set_submodule


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """What an aten call computes: a module made by ``make(weight)``, or ``function``."""

    x: Any
    tensors: dict[str, Any]  # the module's parameters and buffers by name → nodes
    options: dict[str, Any]  # what tells two calls of one weight apart
    make: Callable[[torch.Tensor], nn.Module]
    function: Callable[..., Any]
    arguments: dict[str, Any]


def _geometry(given: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, (list, tuple)) else value

    return {key: plain(given[key]) for key in keys}


def _conv(kind: type[nn.Module], function: Callable[..., Any]) -> Callable[..., LayerCall]:
    def build(given: dict[str, Any]) -> LayerCall:
        options = _geometry(given, ("stride", "padding", "dilation", "groups"))
        bias = given["bias"] is not None

        def make(weight: torch.Tensor) -> nn.Module:
            channels = weight.shape[1] * options["groups"], weight.shape[0]
            kernel = tuple(weight.shape[2:])
            return kind(*channels, kernel, **options, bias=bias, device="meta")

        tensors = {"weight": given["weight"], "bias": given["bias"]}
        arguments = {"input": given["input"], **tensors, **options}
        return LayerCall(given["input"], tensors, options, make, function, arguments)

    return build


def _transposed(kind: type[nn.Module], function: Callable[..., Any]) -> Callable[..., LayerCall]:
    def build(given: dict[str, Any]) -> LayerCall:
        keys = ("stride", "padding", "output_padding", "groups", "dilation")
        options, bias = _geometry(given, keys), given["bias"] is not None

        def make(weight: torch.Tensor) -> nn.Module:
            channels = weight.shape[0], weight.shape[1] * options["groups"]
            kernel = tuple(weight.shape[2:])
            return kind(*channels, kernel, **options, bias=bias, device="meta")

        tensors = {"weight": given["weight"], "bias": given["bias"]}
        arguments = {"input": given["input"], **tensors, **options}
        return LayerCall(given["input"], tensors, options, make, function, arguments)

    return build


def _linear(given: dict[str, Any]) -> LayerCall:
    tensors = {"weight": given["weight"], "bias": given["bias"]}
    bias = given["bias"] is not None

    def make(weight: torch.Tensor) -> nn.Module:
        return nn.Linear(weight.shape[1], weight.shape[0], bias=bias, device="meta")

    arguments = {"input": given["input"], **tensors}
    return LayerCall(given["input"], tensors, {}, make, functional.linear, arguments)


def _batch_norm(given: dict[str, Any]) -> LayerCall:
    tensors = {key: given[key] for key in ("weight", "bias", "running_mean", "running_var")}
    options = {"eps": given["eps"], "momentum": given["momentum"]}
    affine = given["weight"] is not None
    rank = _rank(given["input"])
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[rank]

    def make(weight: torch.Tensor) -> nn.Module:
        return kind(len(weight), **options, affine=affine, device="meta")

    arguments = {**options, **tensors, "input": given["input"], "training": given["training"]}
    return LayerCall(given["input"], tensors, options, make, functional.batch_norm, arguments)


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else 4


def _layer_norm(given: dict[str, Any]) -> LayerCall:
    tensors = {"weight": given["weight"], "bias": given["bias"]}
    shape, eps = tuple(given["normalized_shape"]), given["eps"]
    affine, bias = given["weight"] is not None, given["bias"] is not None

    def make(weight: torch.Tensor) -> nn.Module:
        return nn.LayerNorm(shape, eps, affine, bias, device="meta")

    options = {"normalized_shape": shape, "eps": eps}
    arguments = {"input": given["input"], **tensors, **options}
    return LayerCall(given["input"], tensors, options, make, functional.layer_norm, arguments)


def _group_norm(given: dict[str, Any]) -> LayerCall:
    tensors = {"weight": given["weight"], "bias": given["bias"]}
    options = {"num_groups": given["num_groups"], "eps": given["eps"]}

    def make(weight: torch.Tensor) -> nn.Module:
        return nn.GroupNorm(given["num_groups"], len(weight), given["eps"], device="meta")

    arguments = {"input": given["input"], **tensors, **options}
    return LayerCall(given["input"], tensors, options, make, functional.group_norm, arguments)


def _embedding(given: dict[str, Any]) -> LayerCall:
    padding = None if given["padding_idx"] == -1 else given["padding_idx"]
    tensors = {"weight": given["weight"]}

    def make(weight: torch.Tensor) -> nn.Module:
        rows, width = weight.shape
        return nn.Embedding(rows, width, padding_idx=padding, device="meta")

    options = {"padding_idx": padding}
    arguments = {"input": given["indices"], **tensors, **options}
    return LayerCall(given["indices"], tensors, options, make, functional.embedding, arguments)


#: By the aten operator's name.
LAYERS: dict[str, Callable[[dict[str, Any]], LayerCall]] = {
    "conv1d": _conv(nn.Conv1d, functional.conv1d),
    "conv2d": _conv(nn.Conv2d, functional.conv2d),
    "conv3d": _conv(nn.Conv3d, functional.conv3d),
    "conv_transpose1d": _transposed(nn.ConvTranspose1d, functional.conv_transpose1d),
    "conv_transpose2d": _transposed(nn.ConvTranspose2d, functional.conv_transpose2d),
    "conv_transpose3d": _transposed(nn.ConvTranspose3d, functional.conv_transpose3d),
    "linear": _linear,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "embedding": _embedding,
}


def live_layer(root: nn.Module, call: LayerCall, made: dict[str, LayerCall]) -> str | None:
    """Path of the module that computes a call, made on first use; None where none can.

    It stands where its tensors do, and must be all that stands there.
    """
    nodes = {key: node for key, node in call.tensors.items() if node is not None}
    paths = {_owner(node, key) for key, node in nodes.items()}
    path = paths.pop() if len(paths) == 1 else None
    if not path:
        return None
    if path in made:
        return path if made[path].options == call.options else None
    owner = root.get_submodule(path)
    names = {*owner._parameters, *owner._buffers} - {"num_batches_tracked"}
    if owner._modules or names != set(nodes):
        return None
    tensors: dict[str, Any] = {**owner._buffers, **owner._parameters}
    layer = call.make(tensors["weight"] if "weight" in tensors else tensors["running_mean"])
    for registry in ("_parameters", "_buffers"):
        own = getattr(owner, registry)
        target = getattr(layer, registry)
        target.update({key: own[key] for key in target if key in own})
    set_submodule(root, path, layer.eval())
    made[path] = call
    return path


def _owner(node: Any, key: str) -> str | None:
    """``layer.0`` of a get_attr of ``layer.0.weight``; None of anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, leaf = str(node.target).rpartition(".")
    return path if leaf == key else None
