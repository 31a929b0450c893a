"""Which calls write into a tensor, and the call that gives the same value without writing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import fx, nn

from ..graph import KIND, called_module, called_name, value_kind
from .aliasing import source_of, write_view
from .operators import operator_of, without_writing, written_arguments

AUGMENTED: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.imatmul: operator.matmul,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}
_WHOLE = ("copy_", "fill_")  # write_view with the value itself
_SHAPES = frozenset("unsqueeze_ squeeze_ t_ transpose_ swapaxes_ swapdims_ resize_ set_".split())
_NOT_DATA = frozenset(("requires_grad_", "retain_grad_", "share_memory_", "detach_"))


def mutated(stage: nn.Module, node: fx.Node) -> fx.Node | None:
    """The node whose tensor a call writes into; None for a call that doesn't write."""
    module = called_module(stage, node)
    if module is not None:
        return source_of(node) if getattr(module, "inplace", False) is True else None
    if node.op not in ("call_function", "call_method"):
        return None
    if operator_of(node) is not None:
        return next(iter(written_arguments(node)), None)
    target = node.kwargs.get("out")
    if isinstance(target, fx.Node):
        return target
    source = source_of(node)
    if node.target in AUGMENTED or node.target is operator.setitem:
        is_tensor = source is not None and value_kind(source) != "other"
        return source if is_tensor else None
    return source if _is_underscored(node) or _inplace_flag(node) else None


def _is_underscored(node: fx.Node) -> bool:
    name = called_name(node)
    if getattr(node.target, "__module__", "") == "_operator":  # and_, or_ and not_ are keywords
        return False
    return name.endswith("_") and not name.endswith("__") and name not in _NOT_DATA


def _inplace_flag(node: fx.Node) -> bool:
    """Whether a functional call has ``inplace=True`` (fx gives torch's functions by keyword)."""
    return node.op == "call_function" and node.kwargs.get("inplace") is True


def why_in_place(stage: nn.Module, node: fx.Node) -> str:
    """Why a writing call has no form that doesn't write; ``""`` where it has one."""
    name = called_name(node)
    module = called_module(stage, node)
    if module is not None:
        known = type(module).__module__.startswith("torch.nn.modules.")
        return "" if known else f"{type(module).__name__}(inplace=True) is not a torch module"
    if operator_of(node) is not None:
        return "" if without_writing(node) else f"{node.target} writes into what it is given"
    if "out" in node.kwargs:
        return f"{name}(out=…) writes where the caller says"
    if node.target in AUGMENTED or node.target is operator.setitem or _inplace_flag(node):
        return ""
    if name in _SHAPES:
        return f"{name} changes a tensor's shape in place"
    if name in _WHOLE or name == "zero_" or _plain(node) is not None:
        return ""
    return f"{name} has no form that leaves its input alone"


def _plain(node: fx.Node) -> Any:
    """``relu`` for ``relu_``: a method's name or a function."""
    name = called_name(node)[:-1]
    if node.op == "call_method":
        return name if hasattr(torch.Tensor, name) else None
    return getattr(torch, name, None) or getattr(functional, name, None)


def write_out_of_place(stage: nn.Module, node: fx.Node) -> None:
    """Change a writing call, whose arguments are up to date, into the one that doesn't write."""
    module = called_module(stage, node)
    if module is not None:
        module.inplace = False  # type: ignore[assignment]
        return
    name = called_name(node)
    if operator_of(node) is not None:
        twin = without_writing(node)
        assert twin is not None
        node.target = twin
    elif node.target in AUGMENTED:
        node.target = AUGMENTED[node.target]
    elif node.target is operator.setitem:
        base, index, value = node.args
        _call(node, write_view, (base, value, (("getitem", (index,), {}),)))
    elif _inplace_flag(node):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif name == "zero_":
        _call(node, torch.zeros_like, (node.args[0],))
    elif name in _WHOLE:
        _call(node, write_view, (node.args[0], node.args[1], ()))
    else:
        node.target = _plain(node)


def _call(node: fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    node.op, node.target, node.args, node.kwargs = "call_function", target, args, {}
    node.meta[KIND] = "tensor"  # what wrote may have given nothing
