"""Which values of a graph may share memory: needed to take mutation out of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..graph import called_module, called_name, value_kind
from .index_ops import DROPOUT_MODULES, is_torch_call
from .operators import operator_alias_kind, operator_of, written_arguments

#: Always a view of their first argument.
VIEWS = frozenset(
    (
        "view permute transpose swapaxes swapdims movedim moveaxis t adjoint squeeze unsqueeze "
        "narrow select expand expand_as broadcast_to chunk split tensor_split unbind diagonal "
        "detach view_as unflatten T mT getitem"
    ).split()
)
#: A view or a copy, depending on strides, dtype or mode.
PERHAPS = frozenset(
    (
        "reshape reshape_as flatten ravel contiguous to type type_as float double half bfloat16 "
        "cpu data dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout"
    ).split()
)
_PERHAPS_MODULES = (nn.Flatten, nn.Unflatten, *DROPOUT_MODULES)


def source_of(node: fx.Node) -> fx.Node | None:
    """The first argument, where it is a node."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


def alias_kind(stage: nn.Module, node: fx.Node) -> str:
    """How a call's result shares memory with its inputs.

    ``"same"`` (is its first argument), ``"view"``, ``"perhaps"``, ``"fresh"``, or ``"unknown"``
    (a call into code nobody has read here).
    """
    module = called_module(stage, node)
    if module is not None:
        return _module_kind(module)
    name = called_name(node)
    if node.op == "call_function" and node.target is getattr:
        name = str(node.args[1])
        return "perhaps" if name in PERHAPS else "view" if name in VIEWS else "fresh"
    if node.op not in ("call_function", "call_method"):
        return "fresh"
    called = operator_of(node)
    if called is not None:
        return operator_alias_kind(called)
    if not (is_torch_call(node, name) or _is_builtin(node)):
        return "unknown"
    if name == "getitem":
        return _getitem_kind(node)
    return "view" if name in VIEWS else "perhaps" if name in PERHAPS else "fresh"


def _module_kind(module: nn.Module) -> str:
    if type(module) is nn.Identity:
        return "same"
    if isinstance(module, _PERHAPS_MODULES):
        return "perhaps"
    return "fresh" if type(module).__module__.startswith("torch.nn.modules.") else "unknown"


def _is_builtin(node: fx.Node) -> bool:
    module = getattr(node.target, "__module__", None) or ""
    return module.split(".")[0] in ("torch", "_operator", "math", "builtins")


def _getitem_kind(node: fx.Node) -> str:
    """Slices and numbers give a view, tensors as index a copy; a user's dict gives its member."""
    source = node.args[0]
    if isinstance(source, fx.Node) and (
        value_kind(source) == "other" or _gives_fresh_tensors(source)
    ):
        return "fresh"
    kinds: list[str] = []
    fx.map_arg(node.args[1], lambda arg: kinds.append(value_kind(arg)))
    if "tensor" in kinds:
        return (
            "perhaps"
            if any(arg.op == "placeholder" for arg in node.all_input_nodes[1:])
            else ("fresh")
        )
    if _has_tensor_list(node.args[1]):
        return "fresh"
    return "view"


#: Calls that give several tensors of their own, if not asked for one (``max`` without an axis).
_SEVERAL = frozenset("topk sort kthvalue mode std_mean var_mean aminmax max min unique".split())


def _gives_fresh_tensors(node: fx.Node) -> bool:
    """Whether a call gives a tuple of tensors that are views of nothing."""
    name = called_name(node)
    if name in _SEVERAL:
        return True
    return value_kind(node) == "tuple" and name not in VIEWS and node.op != "placeholder"


def _has_tensor_list(index: Any) -> bool:
    """Lists and constant tensors index by copy."""
    members = index if isinstance(index, tuple) else (index,)
    return any(isinstance(member, (list, torch.Tensor)) for member in members)


class Aliases:
    """The alias edges of a graph: every node's parent and how it follows from it.

    ``parent``: the nearest value that a node is (``"same"``) or is a view of (``"view"``); itself
    it is never the ``"same"`` as another, lest a long chain of ``x += …`` be walked at every step.
    """

    def __init__(
        self, stage: nn.Module, graph: fx.Graph, results: Callable[[fx.Node], Any]
    ) -> None:
        self.parent: dict[fx.Node, tuple[fx.Node, str]] = {}
        self._roots: dict[fx.Node, fx.Node] = {}  # of nodes that have a parent
        self.loose: list[tuple[fx.Node, fx.Node]] = []  # pairs that may share memory
        for node in graph.nodes:
            target = results(node)
            if target is not None:
                self._add(node, target, "same")
                # An operator may write into more than one tensor: all of them stay together.
                self.loose.extend((more, node) for more in written_arguments(node)[1:])
                continue
            kind, source = alias_kind(stage, node), source_of(node)
            if kind in ("same", "view") and source is not None:
                self._add(node, source, kind)
            elif kind == "perhaps" and source is not None:
                self.loose.append((source, node))
            elif kind == "unknown":
                self.loose.extend((s, node) for s in node.all_input_nodes)

    def _add(self, node: fx.Node, source: fx.Node, kind: str) -> None:
        above, how = self.parent.get(source, (source, "same"))
        self.parent[node] = (above if how == "same" else source, kind)
        self._roots[node] = self.root(source)

    def root(self, node: fx.Node) -> fx.Node:
        """The value that a node surely is, or is a view of."""
        return self._roots.get(node, node)

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """The view calls from the root to a node, in order of application."""
        calls: list[fx.Node] = []
        while node in self.parent:
            parent, kind = self.parent[node]
            if kind == "view":
                calls.append(node)
            node = parent
        return calls[::-1]


def view_step(call: fx.Node) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """A view call as data for :func:`write_view`."""
    if call.target is getattr:
        return str(call.args[1]), (), {}
    return called_name(call), tuple(call.args[1:]), dict(call.kwargs)


def write_view(
    base: torch.Tensor, value: Any, steps: tuple[tuple[str, tuple[Any, ...], dict[str, Any]], ...]
) -> torch.Tensor:
    """A copy of ``base`` in which the part that ``steps`` lead to holds ``value``.

    Graph node: the functional form of writing through a view, and of ``base[index] = value``.
    """
    result = base.clone()
    part: Any = result
    for name, args, kwargs in steps[:-1]:
        part = _step(part, name, args, kwargs)
    name, args, kwargs = steps[-1] if steps else ("getitem", (...,), {})
    if name == "getitem" and isinstance(part, torch.Tensor):
        part[args[0]] = value
    else:
        _step(part, name, args, kwargs).copy_(value)
    return result


def _step(part: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name == "getitem":
        return operator.getitem(part, args[0])
    found = getattr(part, name)
    return found(*args, **kwargs) if callable(found) else found
