"""The torch function or Tensor method that computes what an exported graph's operator call does.

A twin is taken only where, on the fake values that the export left in the graph, it dispatches to
the very same operators with the same arguments: then it has the same bits. The few that are
renamed by hand are in ``_HAND_WRITTEN``. What has no twin stays an operator call, in float.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as functional
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .operators import base_name, bound_arguments, operator_of

_END = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class Twin:
    """A call: ``op`` and ``target`` of an fx node, and its arguments.

    ``first``: it gives alone the first of the several values that the operator gives.
    """

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    first: bool = False

    def run(self, args: Any, kwargs: Any) -> Any:
        if self.op == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


def twin_of(node: fx.Node, first_only: bool) -> Twin | None:
    """The twin of an operator call; None where there is none.

    ``first_only``: nobody reads but the first of the values that it gives.
    """
    called = operator_of(node)
    if called is None:
        return None
    name = base_name(called)
    written = _HAND_WRITTEN.get(name)
    if written is not None:
        return written(node)
    for twin in _candidates(node, name, first_only):
        if runs_same(node, twin):
            return twin
    return None


def _candidates(node: fx.Node, name: str, first_only: bool) -> Iterator[Twin]:
    renamed = _RENAMED.get(name)
    if renamed is not None:
        yield from renamed(node)
    if first_only:
        pool = getattr(functional, name.removesuffix("_with_indices"), None)
        if pool is not None:
            yield Twin("call_function", pool, node.args, dict(node.kwargs), first=True)
    if not name.isidentifier():
        return
    if not name.endswith("_"):
        for owner in (torch, functional):
            function = getattr(owner, name, None)
            if callable(function):
                yield Twin("call_function", function, node.args, dict(node.kwargs))
                if len(node.args) > 1:
                    yield Twin("call_function", function, node.args[:1], _named(node))
    if hasattr(torch.Tensor, name) and node.args and isinstance(node.args[0], fx.Node):
        yield Twin("call_method", name, node.args, dict(node.kwargs))


def _named(node: fx.Node) -> dict[str, Any]:
    """All given arguments but the first, by name."""
    called = operator_of(node)
    assert called is not None
    names = [argument.name for argument in called._schema.arguments]
    given = dict(zip(names[1:], node.args[1:], strict=False))
    return {**given, **node.kwargs}


# Proof


class _Calls(TorchDispatchMode):
    """Notes every operator that runs, with its arguments; tensors by order of appearance."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.tensors: list[torch.Tensor] = []
        self.calls: list[str] = []
        self.describe(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace != "prim":  # asks for a device, computes nothing
            self.calls.append(f"{func} {self.describe((args, kwargs or {}))}")
            self.describe(result)
        return result

    def describe(self, value: Any) -> str:
        leaves, structure = pytree.tree_flatten(value)
        return f"{structure} {[self._leaf(leaf) for leaf in leaves]}"

    def _leaf(self, leaf: Any) -> str:
        if not isinstance(leaf, torch.Tensor):
            return f"{type(leaf).__name__} {leaf}"
        for place, known in enumerate(self.tensors):
            if known is leaf:
                return f"tensor {place}"
        self.tensors.append(leaf)
        return f"tensor {len(self.tensors) - 1}"


def runs_same(node: fx.Node, twin: Twin) -> bool:
    """Whether a twin runs the same operators on the node's fake values and gives the same."""
    called = operator_of(node)
    if called is None or any("val" not in source.meta for source in node.all_input_nodes):
        return False

    def run_operator(args: Any, kwargs: Any) -> Any:
        result = called(*args, **kwargs)
        return result[0] if twin.first else result

    try:
        return _run(node, node.args, node.kwargs, run_operator) == _run(
            node, twin.args, twin.kwargs, twin.run
        )
    except Exception:  # arguments that the function does not take, or values not known yet
        return False


def _run(
    node: fx.Node, args: Any, kwargs: Any, function: Callable[[Any, Any], Any]
) -> tuple[list[str], str]:
    """The operators that a function runs on fake values, and what it gives."""
    called = operator_of(node)
    writes = called is not None and called._schema.is_mutable
    values = {n: _copied(n.meta["val"]) if writes else n.meta["val"] for n in node.all_input_nodes}
    own_args, own_kwargs = (fx.map_arg(part, values.__getitem__) for part in (args, kwargs))
    calls = _Calls(list(values.values()))
    with torch.no_grad(), calls:
        result = function(own_args, own_kwargs)
    # An operator gives a list where a function gives a tuple.
    return calls.calls, calls.describe(tuple(result) if isinstance(result, list) else result)


def _copied(value: Any) -> Any:
    with torch.no_grad():
        return pytree.tree_map_only(torch.Tensor, torch.clone, value)


# Renamed ones, proved like the others


def _method(name: str, *args: Any, **kwargs: Any) -> Twin:
    return Twin("call_method", name, args, kwargs)


def _function(target: Any, *args: Any, **kwargs: Any) -> Twin:
    return Twin("call_function", target, args, kwargs)


def _upsample(node: fx.Node, mode: str) -> Iterator[Twin]:
    bound = bound_arguments(node)
    if {"output_size", "scale_factors"} <= bound.keys():
        size, scales = bound["output_size"], bound["scale_factors"]
        yield _function(functional.interpolate, bound["input"], size, scales, mode=mode)


def _pad(node: fx.Node, mode: str) -> Iterator[Twin]:
    bound = bound_arguments(node)
    value = {"value": bound["value"]} if mode == "constant" else {}
    padding = bound.get("pad", bound.get("padding"))
    yield _function(functional.pad, bound["self"], padding, mode=mode, **value)


def _convolution(node: fx.Node) -> Iterator[Twin]:
    bound = bound_arguments(node)
    rank = len(bound["stride"])
    operands = (bound["input"], bound["weight"], bound["bias"])
    stride, padding, dilation = (bound[key] for key in ("stride", "padding", "dilation"))
    if bound["transposed"]:
        function = getattr(functional, f"conv_transpose{rank}d")
        more = (bound["output_padding"], bound["groups"], dilation)
        yield _function(function, *operands, stride, padding, *more)
    else:
        function = getattr(functional, f"conv{rank}d")
        yield _function(function, *operands, stride, padding, dilation, bound["groups"])


def _to_copy(node: fx.Node) -> Iterator[Twin]:
    given = {key: value for key, value in node.kwargs.items() if value is not None}
    yield Twin("call_method", "to", node.args, {**given, "copy": True})


_RENAMED: dict[str, Callable[[fx.Node], Iterator[Twin]]] = {
    "_to_copy": _to_copy,
    "convolution": _convolution,
    "constant_pad_nd": lambda node: _pad(node, "constant"),
    **{f"reflection_pad{rank}d": lambda node: _pad(node, "reflect") for rank in (1, 2, 3)},
    **{f"replication_pad{rank}d": lambda node: _pad(node, "replicate") for rank in (1, 2, 3)},
    **{f"upsample_nearest{rank}d": lambda node: _upsample(node, "nearest") for rank in (1, 2, 3)},
    **{
        f"_upsample_nearest_exact{rank}d": lambda node: _upsample(node, "nearest-exact")
        for rank in (1, 2, 3)
    },
}


# Factories: torch's functions fill in options that change nothing, which the proof would not see

_FACTORIES = (
    "zeros ones full empty arange eye linspace rand randn randint scalar_tensor zeros_like "
    "ones_like full_like empty_like rand_like randn_like"
).split()


def _factory(node: fx.Node, name: str) -> Twin:
    return _function(getattr(torch, name), *node.args, **node.kwargs)


# Written by hand: the same values by the operators' definitions, though not the same operators


def _slice(node: fx.Node) -> Twin | None:
    """``x[:, start:end:step]``."""
    bound = bound_arguments(node)
    axis, end = bound["dim"], bound["end"]
    if axis < 0:
        value = node.all_input_nodes[0].meta.get("val")
        if value is None:
            return None
        axis += value.dim()
    part = slice(
        None if _is_number(bound["start"], 0) else bound["start"],
        None if _is_number(end, _END) else end,
        None if _is_number(bound["step"], 1) else bound["step"],
    )
    key = (*(slice(None),) * axis, part)
    return _function(operator.getitem, bound["self"], key)


def _is_number(value: Any, number: int) -> bool:
    return isinstance(value, int) and value == number


def _index(node: fx.Node) -> Twin:
    """``x[:, rows]``."""
    tensor, indices = node.args[0], node.args[1]
    assert isinstance(indices, (list, tuple))
    key = tuple(slice(None) if index is None else index for index in indices)
    return _function(operator.getitem, tensor, key)


def _softmax(node: fx.Node, function: Callable[..., Any]) -> Twin | None:
    half_to_float = node.args[2]
    return None if half_to_float else _function(function, *node.args[:2])


_HAND_WRITTEN: dict[str, Callable[[fx.Node], Twin | None]] = {
    **{name: partial(_factory, name=name) for name in _FACTORIES},
    "slice": _slice,
    "index": _index,
    "_softmax": lambda node: _softmax(node, torch.softmax),
    "_log_softmax": lambda node: _softmax(node, torch.log_softmax),
    "_unsafe_view": lambda node: _method("reshape", *node.args),
    "sym_size": lambda node: _method("size", *node.args),
    "sym_stride": lambda node: _method("stride", *node.args),
    "sym_numel": lambda node: _method("numel", *node.args),
    # A view that no gradient passes; written in place, it would cut the tensor's other readers off.
    "detach_": lambda node: _method("detach", *node.args),
}
