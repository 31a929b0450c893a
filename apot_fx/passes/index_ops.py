"""Which ops run on indices as well as on values (contract 4.12), and which only clamp.

Quantization is monotone, so whatever moves or compares values may move or compare indices.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

import torch
import torch.nn.functional as functional
from torch import fx, nn

from ..graph import argument, called_module, called_name, value_kind
from ..nn import ConvertedOp

#: Ops that move values about; the same call runs on an index tensor.
MOVES = frozenset(
    (
        "reshape view flatten unflatten permute transpose swapaxes swapdims movedim moveaxis t "
        "adjoint squeeze unsqueeze contiguous clone expand flip fliplr flipud narrow select "
        "index_select chunk split tensor_split unbind getitem roll rot90 repeat tile broadcast_to "
        "ravel pixel_shuffle pixel_unshuffle channel_shuffle"
    ).split()
)
MOVE_MODULES = (
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    nn.ReflectionPad1d,
    nn.ReflectionPad2d,
    nn.ReplicationPad1d,
    nn.ReplicationPad2d,
    nn.ReplicationPad3d,
    nn.CircularPad1d,
    nn.CircularPad2d,
)
JOINS = frozenset({"cat", "concat", "concatenate", "stack"})
MAX_POOLS = frozenset({"max_pool1d", "max_pool2d", "max_pool3d"}) | frozenset(
    f"adaptive_max_pool{rank}d" for rank in (1, 2, 3)
)
MAX_POOL_MODULES = (
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
)
ZERO_PADS = (
    nn.ZeroPad1d,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad1d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
)
DROPOUT_MODULES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
#: Max pools run through float32 of the index: torch (2.13) has no integer kernel for some, and for
#: channels-last bytes one that refuses more than 255 places.
FLOAT_ONLY = MAX_POOLS | {kind.__name__ for kind in MAX_POOL_MODULES}
NEAREST = frozenset({"nearest", "nearest-exact"})


@dataclasses.dataclass(frozen=True)
class IndexOp:
    """A match: the nodes values flow in from, and what converting the call takes.

    ``kind``: ``"move"``, ``"max"``, ``"join"``, ``"upsample"``, ``"zero_pad"`` or ``"dropout"``
    (an identity in eval).
    """

    kind: str
    inputs: tuple[fx.Node, ...]


def index_op(stage: nn.Module, node: fx.Node) -> IndexOp | None:
    """Match a call that commutes with a per-tensor quantizer; None otherwise."""
    if node.meta.get("pinned") or node.meta.get("keep") or node.op in ("placeholder", "output"):
        return None
    module = called_module(stage, node)
    kind = _function_kind(stage, node) if module is None else _module_kind(module)
    if not kind:
        return None
    inputs = _inputs(stage, node, joins=kind == "join")
    return IndexOp(kind, inputs) if inputs else None


def _inputs(stage: nn.Module, node: fx.Node, joins: bool) -> tuple[fx.Node, ...]:
    first = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("tensors"))
    candidates = [first]
    if joins and isinstance(first, (list, tuple)):
        candidates = list(first)
    elif joins and not (isinstance(first, fx.Node) and index_op(stage, first)):
        return ()  # a tuple that some call gives
    nodes = [item for item in candidates if isinstance(item, fx.Node)]
    moving = len(nodes) == len(candidates) and all(value_kind(n) != "other" for n in nodes)
    return tuple(nodes) if moving else ()


def _module_kind(module: nn.Module) -> str:
    kind = type(module)
    if kind in MOVE_MODULES:
        return "move"
    if kind in DROPOUT_MODULES:
        return "dropout"
    if kind in MAX_POOL_MODULES:
        return "" if getattr(module, "return_indices", False) else "max"
    if kind in ZERO_PADS:
        return "zero_pad" if getattr(module, "value", 0.0) == 0 else ""
    if kind is nn.UpsamplingNearest2d or (kind is nn.Upsample and module.mode in NEAREST):
        return "upsample"
    return ""


def _function_kind(stage: nn.Module, node: fx.Node) -> str:
    name = called_name(node)
    if node.target is getattr:
        return "move" if node.args[1] in ("T", "mT") else ""
    if not is_torch_call(node, name):
        return ""
    if name == "getitem":
        return "move" if _indexes_tensor(stage, node) else ""
    if name in MOVES:
        return "" if node.kwargs.get("memory_format") is not None else "move"
    if name in JOINS:
        return "join"
    if name in MAX_POOLS:
        return "" if node.kwargs.get("return_indices") else "max"
    if name == "interpolate":
        return "upsample" if argument(node, 3, "mode", "nearest") in NEAREST else ""
    if name == "pad":
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value")
        return ("" if value else "zero_pad") if mode == "constant" else "move"
    return ""


def is_torch_call(node: fx.Node, name: str) -> bool:
    """Whether a call goes to torch (or ``operator``), not to a user's function of that name."""
    if node.op == "call_method":
        return hasattr(torch.Tensor, name)
    owners = (torch, functional, operator)
    return node.op == "call_function" and any(
        getattr(owner, name, None) is node.target for owner in owners
    )


def _indexes_tensor(stage: nn.Module, node: fx.Node) -> bool:
    """Whether a getitem surely reads a tensor, or one of a split's parts."""
    source, key = node.args[0], node.args[1]
    if not isinstance(source, fx.Node) or isinstance(key, str):
        return False
    if value_kind(source) == "tuple":
        return isinstance(key, int) and index_op(stage, source) is not None
    return _gives_one_tensor(stage, source)


#: Calls known to give one tensor; a getitem of anything else may pick from a tuple.
_ONE_TENSOR = frozenset(
    (
        "relu relu6 hardtanh clamp clip clamp_min clamp_max sigmoid hardsigmoid softmax softplus "
        "abs square exp add sub mul div truediv neg pow mean sum sqrt rsqrt gelu silu tanh elu "
        "leaky_relu hardswish mish log_softmax linear conv1d conv2d conv3d matmul bmm einsum "
        "batch_norm layer_norm group_norm instance_norm dropout avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate pad getitem iadd "
        "isub imul"
    ).split()
)
_MANY_TENSORS = (
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.AdaptiveLogSoftmaxWithLoss,
    ConvertedOp,
)


def _gives_one_tensor(stage: nn.Module, node: fx.Node) -> bool:
    module = called_module(stage, node)
    if module is not None:
        own = type(module).__module__.startswith(("torch.nn.modules.", "apot_fx."))
        pairs = isinstance(module, _MANY_TENSORS) or getattr(module, "return_indices", False)
        return own and not pairs
    name = called_name(node)
    if name == "getitem":
        return index_op(stage, node) is not None
    known = name in _ONE_TENSOR or name in MOVES or name in JOINS or name in MAX_POOLS
    return known and is_torch_call(node, name) and value_kind(node) == "tensor"


def bounds(stage: nn.Module, node: fx.Node) -> tuple[float, float] | None:
    """``(low, high)`` of a call that only clamps (relu, relu6, hardtanh, clamp), else None."""
    if node.meta.get("pinned") or node.meta.get("keep"):
        return None
    module = called_module(stage, node)
    if module is not None:
        return _module_bounds(module)
    name = called_name(node)
    if not is_torch_call(node, name):
        return None
    if name == "relu":
        return 0.0, math.inf
    if name == "relu6":
        return 0.0, 6.0
    if name == "hardtanh":
        return _numbers(argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0))
    if name in ("clamp", "clip"):
        return _numbers(argument(node, 1, "min"), argument(node, 2, "max"))
    if name == "clamp_min":
        return _numbers(argument(node, 1, "min"), None)
    if name == "clamp_max":
        return _numbers(None, argument(node, 1, "max"))
    return None


def _module_bounds(module: nn.Module) -> tuple[float, float] | None:
    if type(module) is nn.ReLU:
        return 0.0, math.inf
    if type(module) in (nn.ReLU6, nn.Hardtanh):
        return _numbers(module.min_val, module.max_val)
    return None


def _numbers(low: Any, high: Any) -> tuple[float, float] | None:
    low = -math.inf if low is None else low
    high = math.inf if high is None else high
    plain = isinstance(low, (int, float)) and isinstance(high, (int, float))
    return (float(low), float(high)) if plain and low <= high else None


#: Calls whose result is never negative, and those that keep non-negative values so.
_NON_NEGATIVE = frozenset(
    (
        "relu relu6 sigmoid hardsigmoid softmax softplus abs square exp ReLU ReLU6 Sigmoid "
        "Hardsigmoid Softmax Softmax2d Softplus"
    ).split()
)
_KEEPS_SIGN = frozenset(
    (
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d mean add mul "
        "AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d"
    ).split()
)


def non_negative(stage: fx.GraphModule) -> set[fx.Node]:
    """Nodes whose value, as the graph proves, has no negative element."""
    found: set[fx.Node] = set()
    for node in stage.graph.nodes:
        sources = _sources_of_sign(stage, node)
        if sources is not None and found.issuperset(sources):
            found.add(node)
    return found


def _sources_of_sign(stage: nn.Module, node: fx.Node) -> tuple[fx.Node, ...] | None:
    """Values that must be non-negative for ``node`` to be; None where nothing proves it."""
    module = called_module(stage, node)
    name = called_name(node) if module is None else type(module).__name__
    known = module is not None and type(module).__module__.startswith("torch.nn.")
    limits = bounds(stage, node)
    if limits is not None:
        if limits[0] >= 0:
            return ()
        return tuple(n for n in node.all_input_nodes[:1]) if limits[1] >= 0 else None
    if not known and not is_torch_call(node, name):
        return None
    if name in _NON_NEGATIVE:
        return ()
    match = index_op(stage, node)
    if match is not None:
        return match.inputs
    if name in _KEEPS_SIGN:
        numbers = [a for a in node.args[:2] if isinstance(a, (int, float))]
        if name in ("add", "mul") and (any(a < 0 for a in numbers) or node.kwargs):
            return None
        return tuple(n for n in node.all_input_nodes if value_kind(n) != "other")
    return None
