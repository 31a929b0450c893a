"""Notices what a graph can't hold while a forward is traced: state kept outside of tensors.

An attribute that a forward sets, a random number of Python or NumPy, a global variable: the graph
would hold the value that it had while tracing. The module that does it becomes a leaf instead.
"""

from __future__ import annotations

import dis
import gc
import inspect
import random
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")
#: Modules whose buffers no forward writes.
_OURS = ("apot_fx.nn", "apot_fx.tensor", "apot_fx.fake_quant", "apot_fx.observer")
_CONTAINERS = (list, dict, set)
_SCALARS = (bool, int, float, complex, str)
#: Packages whose functions keep no state that a forward depends on (or call torch themselves).
_LIBRARIES = frozenset("torch numpy apot_fx networkx sympy mpmath opt_einsum triton".split())


class Attributes:
    """The attributes of every module of a model, to compare and to put back."""

    def __init__(self, model: nn.Module) -> None:
        self._before = [
            (name, m, _state(m))
            for name, m in model.named_modules()
            if not isinstance(m, torch.jit.ScriptModule)
        ]
        self._tensors = [(b, b.detach().clone()) for b in _users_tensors(model)]
        self._versions = [(name, p, p._version) for name, p in model.named_parameters()]

    def changed(self) -> dict[str, str]:
        """Modules whose attributes are others than before, and one attribute of each."""
        return {
            name: key
            for name, module, before in self._before
            if (key := _difference(before, _state(module)))
        }

    def written(self) -> str:
        """A parameter that was written into, or ""; writes through ``.data`` do not show."""
        return next((name for name, p, version in self._versions if p._version != version), "")

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was: attributes, registries, members of containers, buffers."""
        for _, module, before in self._before:
            for key in [k for k in module.__dict__ if k not in before]:
                del module.__dict__[key]
            for key, (value, members) in before.items():
                module.__dict__[key] = value
                if isinstance(value, dict):
                    value.clear()
                    value.update(members)
                elif isinstance(value, list):
                    value[:] = members
                elif isinstance(value, set):
                    value.clear()
                    value |= members
        for tensor, value in self._tensors:
            if tensor.shape == value.shape and not torch.equal(tensor, value):
                tensor.copy_(value)
        for _, parameter, version in self._versions:
            if parameter._version != version and id(parameter) in _originals:
                parameter.copy_(_originals[id(parameter)])


_originals: dict[int, torch.Tensor] = {}


@contextmanager
def restored_from(model: nn.Module, original: nn.Module) -> Iterator[None]:
    """While open, parameters that a copy's forward writes are put back from its original's."""
    pairs = list(zip(model.parameters(), original.parameters(), strict=True))
    _originals.update({id(mine): theirs.detach() for mine, theirs in pairs})
    try:
        yield
    finally:
        for mine, _ in pairs:
            _originals.pop(id(mine), None)


@torch.no_grad()
def put_back(parameters: Iterable[nn.Parameter], original: nn.Module) -> bool:
    """Put every parameter of a model's copy back; whether one had been written into."""
    written = False
    for mine, theirs in zip(parameters, original.parameters(), strict=True):
        if _is_plain(mine) and not torch.equal(mine, theirs):
            mine.copy_(theirs)
            written = True
    return written


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """While open, forwards may count and write; after, attributes and buffers are as before."""
    before = Attributes(model)
    try:
        yield
    finally:
        before.restore()


def _state(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every attribute and, of containers, a shallow copy."""
    return {
        key: (value, type(value)(value) if type(value) in _CONTAINERS else _registry(key, value))
        for key, value in module.__dict__.items()
    }


def _registry(key: str, value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else None


def _difference(before: dict[str, tuple[Any, Any]], after: dict[str, tuple[Any, Any]]) -> str:
    for key in before.keys() | after.keys():
        if key == "training" or key.startswith("_tensor_constant"):
            continue
        if key not in before or key not in after:
            return key
        if before[key][0] is not after[key][0] or not _same_members(before[key][1], after[key][1]):
            return key
    return ""


def _same_members(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(
            mine[key] is theirs[key] or key.startswith("_tensor_constant")
            if isinstance(key, str)
            else mine[key] is theirs[key]
            for key in mine
        )
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))
    return bool(mine == theirs) if isinstance(mine, set) else True


def _users_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Buffers and tensors in attributes, into which a forward of a user's may write.

    Packed weights and scales are ours.
    """
    for module in model.modules():
        if not type(module).__module__.startswith(_OURS):
            for key, value in module.__dict__.items():
                registered = key in _REGISTRIES and key != "_buffers"
                yield from () if registered else filter(_is_plain, _held(value))


def _held(value: Any) -> Iterable[Any]:
    """An attribute's value, or the members of a container."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else (value,)


def _is_plain(value: object) -> bool:
    """Whether something is a tensor that can be compared and copied into."""
    plain = isinstance(value, torch.Tensor) and value.layout is torch.strided
    return plain and not (value.is_nested or value.is_meta)  # type: ignore[attr-defined]


def random_state() -> Any:
    """Python's and (where it is loaded) NumPy's generator state, cheap to compare."""
    numpy = sys.modules.get("numpy")
    state: Any = numpy.random.get_state() if numpy is not None else None
    return hash(random.getstate()), state and (state[1].tobytes(), state[2])


@contextmanager
def watching_globals(
    report: Callable[[str], None], visit: Callable[[dict[str, Any]], None]
) -> Iterator[None]:
    """Call ``report(what)`` when a user's function runs that reads or sets changeable globals.

    Containers that a helper reads count only once they have other members at the end. ``visit``
    gets the globals of every user's function before it runs first.
    """
    known: dict[types.CodeType, str] = {}
    containers: dict[int, tuple[str, Any, Any]] = {}

    def profile(frame: types.FrameType, event: str, arg: object) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in known:
            users = code.co_name != "<module>" and _is_users(frame)
            known[code] = _outside_state(frame, containers) if users else ""
            if users:
                visit(frame.f_globals)
        if known[code]:
            report(known[code])

    collects = gc.isenabled()
    gc.disable()  # its callbacks are no part of the forward
    try:
        with _profiling(profile):
            yield
    finally:
        if collects:
            gc.enable()
    for name, container, members in containers.values():
        if not _same_members(members, container):
            report(f"changes the global variable {name!r}")


@contextmanager
def _profiling(profile: Callable[..., None]) -> Iterator[None]:
    """While open, ``profile`` is Python's profile function; a user's profiler pauses."""
    before: Any = sys.getprofile()
    # cProfile's is an object that can't be set as a function: called, it would raise.
    paused = before is not None and not callable(before)
    if paused:
        before.disable()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None if paused else before)
        if paused:
            before.enable()


def _is_users(frame: types.FrameType) -> bool:
    home = str(frame.f_globals.get("__name__", "")).split(".")[0]
    return home not in _LIBRARIES and home not in sys.stdlib_module_names


def _outside_state(frame: types.FrameType, containers: dict[int, tuple[str, Any, Any]]) -> str:
    """The changeable global that a function reads or sets, if any; containers are noted."""
    code = frame.f_code
    for inst in dis.get_instructions(code):
        name = str(inst.argval)
        if inst.opname == "STORE_GLOBAL" or (
            inst.opname == "STORE_DEREF" and name in code.co_freevars
        ):
            return f"sets the variable {name!r} outside of it"
        if inst.opname != "LOAD_GLOBAL":
            continue
        if _may_change(name, frame.f_globals, code):
            return f"reads the global variable {name!r}"
        value: Any = frame.f_globals.get(name)
        if type(value) in _CONTAINERS:
            containers.setdefault(id(value), (name, value, type(value)(value)))
    return ""


def _may_change(name: str, variables: dict[str, Any], code: types.CodeType) -> bool:
    """Whether a global is state: in a forward every plain value may be, in a helper only a plain
    value that some function of its module sets.
    """
    value = variables.get(name)
    if code.co_name == "forward" and type(value) in _CONTAINERS:
        return True
    if type(value) not in _SCALARS and not isinstance(value, torch.Tensor):
        return False
    return code.co_name == "forward" or name in _set_by_functions(variables)


_set_names: dict[int, set[str]] = {}


def _set_by_functions(variables: dict[str, Any]) -> set[str]:
    """Names that functions and methods of a module declare ``global`` and set."""
    known = _set_names.get(id(variables))
    if known is None:
        home = variables.get("__name__")
        known = _set_names[id(variables)] = {
            str(inst.argval)
            for code in _codes(v for v in variables.values() if _home(v) == home)
            for inst in dis.get_instructions(code)
            if inst.opname == "STORE_GLOBAL"
        }
    return known


def _home(value: Any) -> Any:
    return getattr(value, "__module__", None) if callable(value) else None


def _codes(values: Iterable[Any]) -> Iterator[types.CodeType]:
    for value in values:
        if isinstance(value, type):
            yield from _codes(v for v in vars(value).values() if isinstance(v, types.FunctionType))
        code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
        if isinstance(code, types.CodeType):
            yield code
