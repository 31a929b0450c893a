"""What is patched in torch while a forward is traced: tensor factories and state switches."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.nn.utils import stateless

from .proxy import admitting_isinstance, holds_proxy, is_proxy, value_isinstance
from .refusal import Untraceable

if TYPE_CHECKING:
    from .tracer import ApotTracer

#: Calls of ``torch.`` that refuse traced sizes and dtypes: recorded where one is among the
#: arguments. The random ones are always recorded, lest their first values become constants.
_FACTORIES = (
    "arange zeros ones full empty eye linspace logspace tensor as_tensor finfo iinfo tril_indices "
    "triu_indices range scalar_tensor Size"
).split()
#: Calls that no graph can hold, and why.
_REFUSED: dict[tuple[Any, str], str] = {
    (torch, "manual_seed"): "it seeds the random state",
    (torch, "seed"): "it seeds the random state",
    (torch.random, "fork_rng"): "it keeps the random state",
    (torch, "is_grad_enabled"): "it asks whether gradients are on",
    (torch.autograd, "grad"): "it takes gradients",
    (stateless, "_reparametrize_module"): "functional_call with other parameters",
}
#: Those of them that torch's own code calls for the user.
_FOR_USERS = frozenset({(stateless, "_reparametrize_module")})
_RANDOM = "rand randn randint randperm normal bernoulli poisson multinomial".split()


@contextmanager
def recording_factories(tracer: ApotTracer) -> Iterator[None]:
    """While open, tensor factories are graph nodes and entered autocast regions are counted."""
    # fx imports it anyway; it must not learn of torch's functions while they are others.
    dynamo: Any = importlib.import_module("torch._dynamo")
    before = {name: getattr(torch, name) for name in (*_FACTORIES, *_RANDOM)}
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
    marking = dynamo.mark_static_address
    refused = {(owner, name): getattr(owner, name) for owner, name in _REFUSED}
    try:
        for name, function in before.items():
            if not isinstance(function, type):
                setattr(torch, name, _recorded(tracer, function, name in _RANDOM))
        torch.finfo = _recorded(tracer, before["finfo"], False)  # type: ignore[assignment,misc]
        torch.autocast.__enter__ = _entering(tracer, enter)  # type: ignore[method-assign]
        torch.autocast.__exit__ = _leaving(tracer, leave)  # type: ignore[method-assign]
        dynamo.mark_static_address = _on_tensors(marking)
        for place, function in refused.items():
            setattr(*place, _refused(tracer, function, _REFUSED[place], place in _FOR_USERS))
        yield
    finally:
        dynamo.mark_static_address = marking
        for place, function in refused.items():
            setattr(*place, function)
        for name, function in before.items():
            setattr(torch, name, function)
        torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]
        _regions.clear()


def _recorded(tracer: ApotTracer, function: Callable[..., Any], always: bool) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        traced = always or holds_proxy(args) or holds_proxy(kwargs.values())
        if tracer.concrete or not traced:
            return function(*args, **kwargs)
        return tracer.create_proxy("call_function", function, args, kwargs)

    return record


@contextmanager
def tracing_into_wrapped() -> Iterator[None]:
    """While open, functions that users gave to ``torch.fx.wrap`` are traced into.

    They are wrapped since fx itself can't follow them; what an example's values can't follow either
    becomes an opaque function.
    """
    wrapped = fx._symbolic_trace._wrapped_fns_to_patch
    before = dict(wrapped)
    for key, variables in before.items():
        if not str(variables.get("__name__", "")).startswith(("apot_fx.", "torch.")):
            del wrapped[key]
    try:
        yield
    finally:
        wrapped.clear()
        wrapped.update(before)


def _refused(
    tracer: ApotTracer, function: Callable[..., Any], what: str, for_users: bool
) -> Callable[..., Any]:
    """What no graph holds: state that is asked for or set while the forward runs.

    ``for_users``: also where torch's own code calls it.
    """

    def refuse(*args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_code.co_filename
        own = "/torch/" in caller or "/apot_fx/" in caller
        if tracer.concrete or (own and not for_users):
            return function(*args, **kwargs)
        raise Untraceable(what)

    return refuse


def _on_tensors(mark: Callable[..., Any]) -> Callable[..., Any]:
    """Marks are hints for a compiler; what is traced has no address yet."""

    def marked(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        return None if is_proxy(tensor) else mark(tensor, *args, **kwargs)

    return marked


class AskingValues:
    """Puts an ``isinstance`` that asks proxies' values into users' modules, and takes it out.

    ``admits``: whether ``isinstance(x, torch.fx.Proxy)`` is true of what is traced.
    """

    def __init__(self, admits: bool) -> None:
        self._isinstance = admitting_isinstance if admits else value_isinstance
        self._before: list[tuple[dict[str, Any], Any]] = []
        self._seen: set[int] = set()

    def visit(self, variables: dict[str, Any]) -> None:
        if id(variables) not in self._seen:
            self._seen.add(id(variables))
            self._before.append((variables, variables.get("isinstance")))
            variables["isinstance"] = self._isinstance

    def restore(self) -> None:
        for variables, before in self._before:
            if before is None:
                del variables["isinstance"]
            else:
                variables["isinstance"] = before


_regions: list[None] = []


def _entering(tracer: ApotTracer, enter: Callable[..., Any]) -> Callable[..., Any]:
    def entered(self: Any) -> Any:
        if not tracer.concrete:
            _regions.append(None)
        return enter(self)

    return entered


def _leaving(tracer: ApotTracer, leave: Callable[..., Any]) -> Callable[..., Any]:
    def left(self: Any, *problem: Any) -> Any:
        if not tracer.concrete and _regions:
            _regions.pop()
        return leave(self, *problem)

    return left


def region_depth() -> int:
    """How many autocast regions the traced forward has entered."""
    return len(_regions)


def ambient_state() -> tuple[bool, bool]:
    """What a forward may switch: gradients and inference mode."""
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled()
