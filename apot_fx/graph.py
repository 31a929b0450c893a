"""Helpers for ``torch.fx`` graphs that know nothing of quantization."""

from __future__ import annotations

import copy
import operator
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from torch import fx, nn

#: torch's convolutions as functions, and how many axes their kernels run along.
CONVOLUTIONS = {functional.conv1d: 1, functional.conv2d: 2, functional.conv3d: 3}
TRANSPOSED_CONVOLUTIONS = {
    functional.conv_transpose1d: 1,
    functional.conv_transpose2d: 2,
    functional.conv_transpose3d: 3,
}

#: ``node.meta`` key: the kind of value seen while tracing, as :func:`value_kind` names it.
KIND = "apot_kind"

#: ``node.meta`` key: whether a value of kind "other" (a dict, an object) holds tensors.
HOLDS = "apot_holds_tensors"

#: Calls that read a tensor's metadata, never its values.
METADATA_METHODS = frozenset({"size", "dim", "ndimension", "numel", "nelement", "stride"})
METADATA_ATTRIBUTES = frozenset({"shape", "ndim", "device"})
_PURE_MODULES = ("torch.nn.modules.", "torch.nn.utils.parametri", "apot_fx.")
_NOT_USER_CODE = ("/torch/", "/apot_fx/passes/")
_SPLITS = frozenset({"chunk", "split", "tensor_split", "unbind", "split_with_sizes"})
_SCALAR_METHODS = METADATA_METHODS | {"item", "tolist", "is_floating_point", "get_device"}


def called_name(node: fx.Node) -> str:
    """The bare name of what a call_function or call_method node calls (``"relu"``), else ``""``."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        target = node.target
        return str(getattr(target, "__name__", type(target).__name__)).split(".")[0]
    return ""


def called_module(owner: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that a call_module node calls, else None."""
    return owner.get_submodule(str(node.target)) if node.op == "call_module" else None


def module_calls(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """The call_module nodes of a graph, by their target, in graph order."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            found.setdefault(str(node.target), []).append(node)
    return found


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def reads_metadata(node: fx.Node) -> bool:
    """Whether the node reads shape-like facts of its input: no value flows through it."""
    if node.op == "call_method":
        return node.target in METADATA_METHODS
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in METADATA_ATTRIBUTES
    return False


def value_kind(node: fx.Node) -> str:
    """``"tensor"``, ``"tuple"`` (of tensors) or ``"other"`` (sizes, numbers, devices).

    Static and conservative: a value nothing is known about counts as a tensor, which is what
    placeholders and calls mostly give.
    """
    if KIND in node.meta:
        return str(node.meta[KIND])
    if node.op == "output":
        return "other"
    if reads_metadata(node) or (node.op == "call_method" and node.target in _SCALAR_METHODS):
        return "other"
    if node.op == "call_function" and node.target is getattr:
        return "tensor" if node.args[1] in ("T", "mT", "data") else "other"
    if called_name(node) in _SPLITS:
        return "tuple"
    if isinstance(node.target, torch._ops.OpOverload):
        return _kind_given(node.target)
    if node.target is operator.getitem:
        source = node.args[0]
        kind = value_kind(source) if isinstance(source, fx.Node) else "other"
        if kind == "tuple" and isinstance(node.args[1], slice):
            return "tuple"
        return "other" if kind == "other" else "tensor"
    if node.op == "call_function" and _is_scalar_arithmetic(node):
        return "other"
    return "tensor"


def _kind_given(called: torch._ops.OpOverload) -> str:
    """The kind of value that an operator gives, by its schema."""
    kinds = [str(result.type) for result in called._schema.returns]
    if kinds == ["Tensor"]:
        return "tensor"
    return "tuple" if kinds and all("Tensor" in kind for kind in kinds) else "other"


def _is_scalar_arithmetic(node: fx.Node) -> bool:
    """Arithmetic between sizes and numbers (``x.size(0) * 2``) gives a number."""
    module = getattr(node.target, "__module__", "")
    inputs = node.all_input_nodes
    return (
        module in ("_operator", "builtins", "math")
        and bool(inputs)
        and all(value_kind(source) == "other" for source in inputs)
    )


def is_kind(value: object, name: str) -> bool:
    """Whether a value's class, or a base of it, is called ``name`` in full; imports nothing.

    Torch's compiler and exporter take seconds to import, and who has their objects has them.
    """
    return any(f"{kind.__module__}.{kind.__qualname__}" == name for kind in type(value).__mro__)


def source(node: fx.Node) -> fx.Node:
    """A call's first argument, which must be a node."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def free_name(owner: nn.Module, stem: str) -> str:
    """``stem_0``, ``stem_1`` …: the next that ``owner`` has no attribute for."""
    registries = (owner._modules, owner._parameters, owner._buffers)

    def is_free(number: int) -> bool:
        return not any(f"{stem}_{number}" in registry for registry in registries)

    end = 1  # numbers are given out in order: doubling and halving finds the first that is free
    while not is_free(end - 1):
        end *= 2
    start = end // 2
    return f"{stem}_{start + bisect_left(range(start, end - 1), True, key=is_free)}"


def set_submodule(owner: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at a dotted path whose parent exists."""
    parent, _, leaf = name.rpartition(".")
    setattr(owner.get_submodule(parent), leaf, module)


def substitute(owners: Iterable[nn.Module], new: Mapping[int, nn.Module]) -> None:
    """Put modules in the place of others (by ``id``), wherever these are registered, and in the
    plain lists, tuples and dicts of modules that hold them."""
    for owner in owners:
        for module in list(owner.modules()):
            for key, value in module.__dict__.items():  # _modules among them
                if any(id(part) in new for part in _parts(value)):
                    module.__dict__[key] = _with_others(value, new)


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if type(value) in (list, tuple) else ()


def _with_others(value: Any, new: Mapping[int, nn.Module]) -> Any:
    """A list, tuple or dict with modules in the place of others; lists and dicts are kept."""
    if isinstance(value, dict):
        value.update({key: new.get(id(part), part) for key, part in value.items()})
        return value
    parts = [new.get(id(part), part) for part in value]
    if isinstance(value, list):
        value[:] = parts
        return value
    return tuple(parts)


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy, also where a module keeps computed tensors (as torch's old weight_norm does)."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in module.__dict__.values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    clone = copy.deepcopy(model, memo)
    for module, twin in zip(model.modules(), clone.modules(), strict=True):
        # Torch's decoder layer puts relu where its activation, a module, is not in its __dict__.
        if isinstance(module, nn.TransformerDecoderLayer) and "activation" in module._modules:
            twin.__dict__.pop("activation", None)
    return clone


def module_aliases(owner: nn.Module) -> dict[int, list[str]]:
    """Every name under which each module object (by ``id``) is registered."""
    names: dict[int, list[str]] = {}
    for name, module in owner.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def replace_argument(node: fx.Node, old: fx.Node, new: Any) -> None:
    """Let one node read ``new`` wherever it reads ``old``."""
    node.args = fx.map_arg(node.args, lambda arg: new if arg is old else arg)
    node.kwargs = fx.map_arg(node.kwargs, lambda arg: new if arg is old else arg)


@torch.no_grad()
def constant_value(owner: nn.Module, node: fx.Node) -> Any:
    """The value now of a node that hangs on parameters and buffers alone."""
    if node.op == "get_attr":
        value: Any = owner
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    args: Any = fx.map_arg(node.args, lambda source: constant_value(owner, source))
    kwargs: Any = fx.map_arg(node.kwargs, lambda source: constant_value(owner, source))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    module = called_module(owner, node)
    if module is not None:
        return _in_eval(module, args, kwargs)
    target: Any = node.target
    return target(*args, **kwargs)


def _in_eval(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A parametrization's value: in train, looking would change it (power iterations)."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        return module.eval()(*args, **kwargs)
    finally:
        for part, training in modes:
            part.training = training


def prune(owner: fx.GraphModule) -> list[str]:
    """Erase calls without effect that nobody reads, and return their names; placeholders stay.

    fx's own dead code elimination goes by a list of names that knows nothing of our modules.
    """
    erased: list[str] = []
    for node in reversed(list(owner.graph.nodes)):
        if node.users or node.meta.get("keep") or not _is_pure(owner, node):
            continue
        erased.append(node.name)
        owner.graph.erase_node(node)
    return erased


def _is_pure(owner: nn.Module, node: fx.Node) -> bool:
    """Whether a call only computes: torch's and our own do, a user's may log or count."""
    module = called_module(owner, node)
    if module is not None:
        return type(module).__module__.startswith(_PURE_MODULES)
    if node.op == "call_method":
        return not str(node.target).endswith("_")
    if node.op != "call_function":
        return node.op == "get_attr"
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        return False
    home = getattr(node.target, "__module__", None) or type(node.target).__module__
    known = home.split(".")[0] in ("torch", "_operator", "builtins", "math", "apot_fx")
    return known and "assert" not in called_name(node) and node.target is not operator.setitem


def user_line(node: fx.Node) -> str:
    """``file.py:12`` of the innermost user line that made the node, or ``""``."""
    trace = node.meta.get("stack_trace") or node.stack_trace or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith("File ")]
    for line in reversed(lines):
        parts = line.split('"')
        if len(parts) < 3 or any(skip in parts[1] for skip in _NOT_USER_CODE):
            continue
        number = parts[2].split("line ")[-1].split(",")[0]
        return f"{parts[1].rsplit('/', 1)[-1]}:{number.strip()}"
    return ""


def describe_call(owner: nn.Module, node: fx.Node) -> str:
    """A short name for what a node does: ``"Conv2d"``, ``"relu"``, ``"placeholder"``."""
    module = called_module(owner, node)
    if module is not None:
        return type(module).__name__
    return called_name(node) or node.op
