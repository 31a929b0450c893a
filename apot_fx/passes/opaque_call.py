"""Functions that can't be traced into: called as a whole, each becomes one node of the graph."""

from __future__ import annotations

import copy
import enum
import inspect
import pickle
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import GuardError
from .proxy import TrainingFlag, is_proxy
from .refusal import Untraceable

_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    slice,
    type(...),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.Tensor,
    enum.Enum,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    nn.Module,
)


class OpaqueCall(nn.Module):
    """A Python function as a leaf: called with its traced arguments only.

    Args:
        function: what is called; it decides for itself, in every call, as in the user's model.
        args, kwargs: its arguments while tracing; what was no proxy stays as it was.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        super().__init__()
        leaves, self.structure = pytree.tree_flatten((args, kwargs), is_leaf=is_proxy)
        self.function = function
        self.places = tuple(place for place, leaf in enumerate(leaves) if is_proxy(leaf))
        # Training flags that it was handed follow its own.
        self.flags = tuple(p for p, leaf in enumerate(leaves) if isinstance(leaf, TrainingFlag))
        # In a tuple, so that modules among them are not registered a second time.
        given = (*self.places, *self.flags)
        self.constants = tuple(None if p in given else leaf for p, leaf in enumerate(leaves))
        self.traced = [leaves[place] for place in self.places]
        self.constants = tuple(_constant(function, leaf) for leaf in self.constants)
        self.gives_none: bool | None = None  # as it did for the example; None: not known

    def take_traced(self) -> tuple[Any, ...]:
        """The proxies, for the call's node; they are not kept."""
        traced, self.traced = tuple(self.traced), []
        return traced

    def forward(self, *traced: Any) -> Any:
        leaves = list(self.constants)
        for place, value in zip(self.places, traced, strict=True):
            leaves[place] = value
        for place in self.flags:
            leaves[place] = bool(int(self.training))
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        result = self.function(*args, **kwargs)
        if self.gives_none not in (None, result is None):
            now, then = ("None", "a value") if result is None else ("a value", "None")
            raise GuardError(
                f"{self.function.__name__}() gives {now}, but gave {then} for the example_inputs, "
                "and the code behind it asks for that; prepare with example_inputs of this kind"
            )
        return result

    def extra_repr(self) -> str:
        return f"{self.function.__module__}.{self.function.__qualname__}"


def _constant(function: Callable[..., Any], value: Any) -> Any:
    """What the graph keeps of an argument; a copy of a user's object, which a call may change."""
    if isinstance(value, _PLAIN) or type(value).__name__.endswith("Config"):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:
        kind = type(value).__name__
        raise Untraceable(f"{function.__name__} is called with a {kind}") from None


def fingerprint(values: Any) -> Any:
    """Something that differs once objects among the values were changed; None where unknown."""
    objects = [v for v in values if not isinstance(v, _PLAIN)]
    try:
        return pickle.dumps(objects)
    except Exception:
        return None


class Record:
    """Builds an object of a user's class in the graph; a call target with a name."""

    def __init__(self, kind: type, plain: bool) -> None:
        self.kind, self.plain = kind, plain
        self.__name__ = self.__qualname__ = kind.__name__
        self.__module__ = kind.__module__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return False
        return self.kind is other.kind and self.plain == other.plain

    def __hash__(self) -> int:
        return hash((self.kind, self.plain))

    def __call__(self, *args: Any, **fields: Any) -> Any:
        if self.plain:
            return self.kind(*args, **fields)
        made: Any = object.__new__(self.kind)
        made.__dict__.update(fields)
        return made


def without_parts(module: nn.Module) -> nn.Module:
    """A module of the same class and plain attributes, without parameters and submodules."""
    shell = object.__new__(type(module))
    shell.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[registry] = {}
    shell.__dict__["training"] = int(module.training) != 0
    return shell


#: Where a function is looked up by name: a module's variables, or a class, and the name.
Place = tuple[dict[str, Any] | type, str]


def places_of(frame: types.FrameType, callers: list[types.FrameType]) -> list[Place]:
    """Where the callers of a function (nearest first) look it up; empty for lambdas and the like.

    Decorated functions run behind their wrapper's frames, so several callers are asked.
    """
    code = frame.f_code
    if code.co_name in ("<module>", "<lambda>", "forward", "__call__"):
        return []
    found: list[Place] = _method_places(frame)
    for variables, names in [
        *((caller.f_globals, caller.f_code.co_names) for caller in callers[:4]),
        (frame.f_globals, (code.co_name,)),
    ]:
        for name in names:
            value = variables.get(name)
            known = any(variables is seen and name == other for seen, other in found)
            if inspect.isroutine(value) and _runs(value, code) and not known:
                found.append((variables, name))
    return found


def _method_places(frame: types.FrameType) -> list[Place]:
    """The class whose method of a module runs."""
    code = frame.f_code
    owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(owner, nn.Module):
        return []
    name = code.co_name
    found = [k for k in type(owner).__mro__ if _runs(vars(k).get(name), code)]
    return [(k, name) for k in found[:1]]


def _runs(function: Any, code: types.CodeType) -> bool:
    return function is not None and getattr(inspect.unwrap(function), "__code__", None) is code
