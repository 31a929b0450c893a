"""Which operator calls of an exported graph are a layer's, and the module that makes them again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from .operators import base_name, bound_arguments, operator_of

#: Shape of a tensor that a node reads from the model; LookupError for any other node.
Shape = Callable[[Any], torch.Size]

_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
_FIRST_OF_SEVERAL = (
    "_native_batch_norm_legit_no_training _native_batch_norm_legit native_batch_norm "
    "native_layer_norm native_group_norm native_dropout"
).split()


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A layer of class ``kind`` called with ``x``.

    ``options``: arguments of its constructor. ``tensors``: the nodes of its parameters and buffers
    by name, None for those it does not have. ``training``: the flag in the call, if there is one.
    ``first``: the operator gives more than the layer, which gives the first of its values.
    ``state``: what a recurrent layer starts from.
    """

    kind: type[nn.Module]
    x: fx.Node
    options: dict[str, Any]
    tensors: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: bool | None = None
    first: bool = False
    state: Any = None

    @property
    def key(self) -> Any:
        """Equal for calls that one module can serve, if their tensors are the same."""
        return self.kind, tuple(sorted((k, str(v)) for k, v in self.options.items()))

    def module(self) -> nn.Module:
        """A new layer, whose parameters and buffers are yet to be put in."""
        makes_tensors = any(node is not None for node in self.tensors.values())
        device = {"device": "meta"} if makes_tensors else {}
        layer = self.kind(**self.options, **device)
        if self.training is not None:
            layer.train(self.training)
        return layer


def layer_call(node: fx.Node, shape: Shape) -> LayerCall | None:
    """The layer that an operator call stands for, by its arguments; None for anything else."""
    called = operator_of(node)
    if called is None:
        return None
    name = base_name(called)
    first = name in _FIRST_OF_SEVERAL
    if first and any(not _is_first(user) for user in node.users):
        return None
    if name.rstrip("_") in (*_DROPOUTS, "native_dropout"):
        return _dropout(node, name, first)
    match = _MATCHES.get(name)
    if match is None:
        return None
    try:
        found = match(node, bound_arguments(node), shape)
    except LookupError:
        return None
    plain = found is not None and isinstance(found.x, fx.Node) and not _holds_node(found.options)
    return dataclasses.replace(found, first=first) if found is not None and plain else None


def _is_first(user: fx.Node) -> bool:
    return user.op == "call_function" and user.args[1:] == (0,)


def _holds_node(options: dict[str, Any]) -> bool:
    """Whether an option of a layer is computed in the graph."""
    nodes: list[fx.Node] = []
    fx.map_arg(options, nodes.append)
    return bool(nodes)


def _dropout(node: fx.Node, name: str, first: bool) -> LayerCall | None:
    x, p, training = (*node.args, *node.kwargs.values())[:3]
    if not isinstance(x, fx.Node) or not isinstance(p, (int, float)):
        return None
    options: dict[str, Any] = {"p": float(p)}
    if name.endswith("_"):
        options["inplace"] = True
    kind = _dropout_type(node, name.rstrip("_"), x)
    return LayerCall(kind, x, options, training=bool(training), first=first)


def _dropout_type(node: fx.Node, name: str, x: fx.Node) -> type[nn.Module]:
    if name == "alpha_dropout":
        return nn.AlphaDropout
    if name == "feature_alpha_dropout":
        return nn.FeatureAlphaDropout
    if name in ("dropout", "native_dropout"):
        return nn.Dropout
    return {3: nn.Dropout1d, 5: nn.Dropout3d}.get(_rank(x), nn.Dropout2d)


def _rank(node: Any) -> int:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, torch.Tensor) else 0


# One function per kind of layer: node, arguments by name, shapes → call

_Bound = dict[str, Any]


def _sizes(value: Any, rank: int) -> Any:
    if isinstance(value, str):
        return value
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    return values * rank if len(values) == 1 else values


def _conv(node: fx.Node, bound: _Bound, shape: Shape) -> LayerCall | None:
    weight, groups = shape(bound["weight"]), bound["groups"]
    rank = len(weight) - 2
    transposed = bound.get("transposed", "output_padding" in bound)
    if not 1 <= rank <= 3:
        return None
    names = ["stride", "padding", "dilation", *(["output_padding"] if transposed else [])]
    options = {name: _sizes(bound[name], rank) for name in names}
    kinds = _TRANSPOSED if transposed else _CONVS
    channels = (weight[0], weight[1] * groups)
    options["in_channels"], options["out_channels"] = (
        channels if transposed else (weight[1] * groups, weight[0])
    )
    options |= {
        "kernel_size": tuple(weight[2:]),
        "groups": groups,
        "bias": bound["bias"] is not None,
    }
    tensors = {"weight": bound["weight"], "bias": bound["bias"]}
    return LayerCall(kinds[rank - 1], bound["input"], options, tensors)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _linear(node: fx.Node, bound: _Bound, shape: Shape) -> LayerCall | None:
    return _linear_call(bound["input"], bound["weight"], bound["bias"], shape)


def _linear_call(x: Any, weight: Any, bias: Any, shape: Shape) -> LayerCall | None:
    size = shape(weight)
    if len(size) != 2:
        return None
    options = {"in_features": size[1], "out_features": size[0], "bias": bias is not None}
    return LayerCall(nn.Linear, x, options, {"weight": weight, "bias": bias})


def _addmm(node: fx.Node, bound: _Bound, shape: Shape) -> LayerCall | None:
    """``addmm(bias, x, weight.t())``, into which decompositions turn a Linear."""
    weight = _transposed(bound["mat2"])
    plain = bound.get("beta", 1) == 1 and bound.get("alpha", 1) == 1
    bias = bound.get("self") if "mat1" in bound else None
    if weight is None or not plain or (bias is not None and len(shape(bias)) != 1):
        return None
    return _linear_call(bound.get("mat1", bound["self"]), weight, bias, shape)


def _transposed(node: Any) -> fx.Node | None:
    """The matrix that a node transposes."""
    called = operator_of(node) if isinstance(node, fx.Node) else None
    if called is None or not isinstance(node.args[0], fx.Node):
        return None
    matrix, name = node.args[0], base_name(called)
    axes = tuple(node.args[1]) if name == "permute" else tuple(node.args[1:])
    swaps = name == "transpose" and {axis % 2 for axis in axes} == {0, 1}
    turned = name == "t" or swaps or (name == "permute" and axes in ((1, 0), (-1, -2)))
    return matrix if turned and _rank(matrix) == 2 else None


def _batch_norm(node: fx.Node, bound: _Bound, shape: Shape) -> LayerCall | None:
    rank = _rank(bound["input"])
    kinds = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if rank not in kinds:
        return None
    training = bool(bound.get("training", False))
    return _norm_with_statistics(kinds[rank], bound, shape, training)


def _instance_norm(node: fx.Node, bound: _Bound, shape: Shape) -> LayerCall | None:
    rank = _rank(bound["input"])
    kinds = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    if rank not in kinds:
        return None
    return _norm_with_statistics(kinds[rank], bound, shape, bool(bound["use_input_stats"]))


def _norm_with_statistics(
    kind: type[nn.Module], bound: _Bound, shape: Shape, training: bool
) -> LayerCall | None:
    tensors = {key: bound[key] for key in ("weight", "bias", "running_mean", "running_var")}
    given = [node for node in tensors.values() if node is not None]
    if not given or (tensors["weight"] is None) != (tensors["bias"] is None):
        return None
    options = {
        "num_features": shape(given[0])[0],
        "eps": bound["eps"],
        # A cumulative average (momentum=None) counts its own factor and exports as 0 in eval.
        "momentum": bound["momentum"] or None,
        "affine": tensors["weight"] is not None,
        "track_running_stats": tensors["running_mean"] is not None,
    }
    return LayerCall(kind, bound["input"], options, tensors, training)


def _layer_norm(node: fx.Node, bound: _Bound, shape: Shape) -> LayerCall | None:
    if bound["weight"] is None:
        return None
    options = {
        "normalized_shape": tuple(bound["normalized_shape"]),
        "eps": bound["eps"],
        "bias": bound["bias"] is not None,
    }
    tensors = {"weight": bound["weight"], "bias": bound["bias"]}
    return LayerCall(nn.LayerNorm, bound["input"], options, tensors)


def _rms_norm(node: fx.Node, bound: _Bound, shape: Shape) -> LayerCall | None:
    if bound["weight"] is None:
        return None
    options = {"normalized_shape": tuple(bound["normalized_shape"]), "eps": bound["eps"]}
    return LayerCall(nn.RMSNorm, bound["input"], options, {"weight": bound["weight"]})


def _group_norm(node: fx.Node, bound: _Bound, shape: Shape) -> LayerCall | None:
    weight = bound["weight"]
    if weight is None or bound["bias"] is None:
        return None
    groups = bound.get("num_groups", bound.get("group"))
    options = {"num_groups": groups, "num_channels": shape(weight)[0], "eps": bound["eps"]}
    return LayerCall(
        nn.GroupNorm, bound["input"], options, {"weight": weight, "bias": bound["bias"]}
    )


def _embedding(node: fx.Node, bound: _Bound, shape: Shape) -> LayerCall | None:
    size, padding = shape(bound["weight"]), bound["padding_idx"]
    if len(size) != 2:
        return None
    options = {
        "num_embeddings": size[0],
        "embedding_dim": size[1],
        "padding_idx": None if padding < 0 else padding,
        "scale_grad_by_freq": bound["scale_grad_by_freq"],
        "sparse": bound["sparse"],
    }
    return LayerCall(nn.Embedding, bound["indices"], options, {"weight": bound["weight"]})


def _prelu(node: fx.Node, bound: _Bound, shape: Shape) -> LayerCall | None:
    count = shape(bound["weight"]).numel()
    tensors = {"weight": bound["weight"]}
    return LayerCall(nn.PReLU, bound["self"], {"num_parameters": count}, tensors)


_Match = Callable[[fx.Node, _Bound, Shape], LayerCall | None]

_MATCHES: dict[str, _Match] = {
    **{f"conv{rank}d": _conv for rank in (1, 2, 3)},
    **{f"conv_transpose{rank}d": _conv for rank in (1, 2, 3)},
    "convolution": _conv,
    "linear": _linear,
    "addmm": _addmm,
    "mm": _addmm,
    "batch_norm": _batch_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "instance_norm": _instance_norm,
    "layer_norm": _layer_norm,
    "native_layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "native_group_norm": _group_norm,
    "embedding": _embedding,
    "prelu": _prelu,
}
