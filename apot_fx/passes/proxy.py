"""What flows through a model's forward while it is traced.

With example inputs a proxy also knows the value that it has there. Then tuples unpack, types can
be asked for, and Python decisions about shapes, types and options are taken as the example takes
them, with a guard in the graph; a decision about a tensor's values is still refused, since the
next batch may decide otherwise.
"""

from __future__ import annotations

import dis
import operator
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..graph import called_name
from .dependence import FIXED
from .guards import (
    check_fact,
    check_given,
    check_keys,
    check_kind,
    check_length,
    check_member,
    kind_of,
)
from .mutation import AUGMENTED
from .refusal import Untraceable

if TYPE_CHECKING:
    from .tracer import ApotTracer

#: The value of a proxy that was made without example inputs.
UNKNOWN = object()

#: Calls that give as many parts as a size says.
_PARTS_BY_SIZE = frozenset("unbind split tensor_split hsplit vsplit dsplit unsafe_split".split())


class ApotProxy(fx.Proxy):
    """Records ``x += y`` and ``x[i] = y`` too; fx's own proxy takes the first for ``x + y``."""

    tracer: ApotTracer

    @classmethod
    def __torch_function__(cls, function: Any, *rest: Any) -> Any:
        Untraceable.dispatched(sys._getframe(1))
        return super().__torch_function__(function, *rest)

    @property
    def value(self) -> Any:
        """The example's value, or UNKNOWN."""
        return self.tracer.value_of(self.node)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """``isinstance(x, int)`` and the like are asked of the value.

        Not so of tensors: torch's C code would take the proxy for one and crash.
        """
        value = self.value
        unknown = value is UNKNOWN or isinstance(value, torch.Tensor)
        return ApotProxy if unknown else type(value)

    def __getitem__(self, key: Any) -> Any:
        if self.value is UNKNOWN and isinstance(key, str):
            raise Untraceable(f"[{key!r}] of something unknown, which may hold None")
        made = self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})
        return self._fact(made)

    def _fact(self, found: Any) -> Any:
        """None, bools and strings as they are in the example, for code that asks ``is None``.

        Under a guard, since another call may hold something else: None for a tensor too.
        """
        value = found.value if is_proxy(found) else UNKNOWN
        if isinstance(value, torch.Tensor) and not isinstance(self.value, torch.Tensor):
            if self.tracer.is_given(self.node):
                self.tracer.guard(check_given, found, str(found.node.args[1]))
            return found
        if value is not None and not isinstance(value, (bool, str)):
            return found
        self.tracer.guard(check_fact, found, value, self.node.name)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise Untraceable(f"it sets {name!r} on something traced")
        super().__setattr__(name, value)

    def __setitem__(self, index: Any, value: Any) -> None:
        held = self.value
        if isinstance(index, str) or (held is not UNKNOWN and not isinstance(held, torch.Tensor)):
            raise Untraceable("it writes into an argument that is no tensor")
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})

    def __getattr__(self, name: str) -> Any:
        value = self.value
        if value is UNKNOWN:
            if not name.startswith("__") and not hasattr(torch.Tensor, name):
                raise Untraceable(f".{name} of something unknown, which may be None")
            return ApotAttribute(self, name)
        if isinstance(value, Mapping) and name in _MAPPING:
            return lambda *args: _MAPPING[name](self, value, *args)
        if isinstance(value, (list, dict, set)) and name in _MUTATORS:
            raise Untraceable(f".{name}() writes into an argument that is no tensor")
        if not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        found = _attribute(value, name)
        made = ApotAttribute(self, name)
        plain = found is None or isinstance(found, (bool, str))
        if isinstance(value, torch.Tensor):
            return found if plain else made  # a fact about the kind of tensor that it is
        return self._fact(made) if plain or isinstance(found, torch.Tensor) else made

    def __bool__(self) -> bool:
        value = self.value
        if value is UNKNOWN:
            return super().__bool__()
        return self.tracer.decide(self, bool(value))

    def __int__(self) -> int:
        return int(self._number("int()"))

    def __index__(self) -> int:
        Untraceable.asking(sys._getframe(1))
        return operator.index(self._number("an index or range()"))

    def __float__(self) -> float:
        return float(self._number("float()"))

    def _number(self, use: str) -> Any:
        value = self.value
        if value is UNKNOWN or isinstance(value, torch.Tensor):
            raise Untraceable(f"{use} of a traced value")
        if self.tracer.hangs_on(self.node) != FIXED:
            raise Untraceable(f"{use} of a size, which may be another next time")
        return self.tracer.decide(self, value)

    def __len__(self) -> int:
        value = self.value
        if value is UNKNOWN:
            return super().__len__()
        by_size = called_name(self.node) in _PARTS_BY_SIZE
        return self._part_count() if by_size else self._length(value)

    def _length(self, value: Any) -> int:
        if isinstance(value, torch.Tensor):
            raise Untraceable("len() of a tensor, which may be another next time")
        if isinstance(value, (list, tuple, Mapping)) and self.tracer.is_given(self.node):
            self.tracer.guard(check_length, self, len(value), self.node.name)
        return len(value)

    def __iter__(self) -> Iterator[Any]:
        value = self.value
        if value is UNKNOWN:
            return self._unpack(sys._getframe(1))
        if isinstance(value, Mapping):
            return iter(self._keys(value))
        if not hasattr(value, "__len__"):
            raise TypeError(f"{type(value).__name__!r} object is not iterable")
        if called_name(self.node) in _PARTS_BY_SIZE and not _unpacked(sys._getframe(1)):
            return iter(members(self, self._part_count()))
        count = _unpacked(sys._getframe(1)) and len(value)
        return iter(members(self, count or self._length(value)))

    def _keys(self, value: Mapping[Any, Any]) -> list[Any]:
        """A mapping's keys, of which each call must have the same."""
        if self.tracer.is_given(self.node):
            self.tracer.guard(check_keys, self, list(value), self.node.name)
        return list(value)

    def _unpack(self, frame: Any) -> Iterator[Any]:
        count = _unpacked(frame)
        return iter(members(self, count)) if count else self.tracer.iter(self)

    def _part_count(self) -> int:
        """How many parts a tensor was split into, which hangs on its size."""
        made = self.tracer.create_proxy("call_function", len, (self,), {})
        assert isinstance(made, ApotProxy)
        count: int = self.tracer.decide(made, made.value)
        return count

    def __contains__(self, item: Any) -> bool:
        value = self.value
        if isinstance(value, Mapping):
            if self.tracer.is_given(self.node):
                self.tracer.guard(check_member, self, item, item in value, self.node.name)
            return item in value
        raise Untraceable("`in` of a traced value")


def _unpacked(frame: Any) -> int:
    """How many names ``a, b = x`` unpacks into where a frame stands; 0 where it does not."""
    for inst in dis.get_instructions(frame.f_code):
        if inst.offset == frame.f_lasti and inst.opname == "UNPACK_SEQUENCE":
            return int(inst.argval)
    return 0


class ApotAttribute(ApotProxy):
    """``x.name``, recorded when it is used: mostly it is called, as a method."""

    def __init__(self, root: fx.Proxy, attr: str) -> None:
        self.__dict__.update(root=root, attr=attr, tracer=root.tracer, made=None)

    @property
    def node(self) -> fx.Node:  # type: ignore[override]
        made: fx.Node | None = self.__dict__["made"]
        if made is None:
            args = (self.root, self.attr)
            try:
                made = self.tracer.create_proxy("call_function", getattr, args, {}).node
            except AttributeError as problem:  # from a property Python would not pass it on
                raise Untraceable(str(problem)) from problem
            self.__dict__["made"] = made
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tracer.create_proxy("call_method", self.attr, (self.root, *args), kwargs)


class TrainingFlag(int):
    """Stands in for ``module.training`` while tracing, and knows whose it is."""

    owner: str
    branched: Callable[[str, str], None]

    def __new__(cls, value: bool, owner: str, branched: Callable[[str, str], None]) -> TrainingFlag:
        flag = super().__new__(cls, value)
        flag.owner, flag.branched = owner, branched
        return flag

    def __bool__(self) -> bool:
        frame = traceback.extract_stack(limit=2)[0]
        self.branched(self.owner, f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}")
        return int(self) != 0


def _attribute(value: Any, name: str) -> Any:
    """A property's value; a method counts as one unknown thing."""
    found = getattr(value, name)
    return UNKNOWN if callable(found) else found


_MAPPING: dict[str, Callable[..., Any]] = {
    "keys": lambda proxy, value: proxy._keys(value),
    "values": lambda proxy, value: [proxy[key] for key in proxy._keys(value)],
    "items": lambda proxy, value: [(key, proxy[key]) for key in proxy._keys(value)],
    "get": lambda proxy, value, *given: _get(proxy, *given),
}


def _get(proxy: Any, key: Any, default: Any = None) -> Any:
    return proxy[key] if key in proxy else default  # noqa: SIM401  (this is that get)


_MUTATORS = frozenset(
    (
        "append extend insert pop remove clear update setdefault popitem sort reverse add discard"
    ).split()
)


def _augmented(target: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _target in AUGMENTED:
    setattr(ApotProxy, f"__{_target.__name__}__", _augmented(_target))


def members(proxy: Any, count: int) -> list[Any]:
    """The first ``count`` members of a traced sequence."""
    return [proxy[place] for place in range(count)]


def is_proxy(value: object) -> bool:
    """Whether something is a proxy: ``isinstance`` would be told the value's class."""
    return issubclass(type(value), fx.Proxy)


def value_isinstance(value: object, kinds: Any) -> bool:
    """``isinstance`` for users' code while it is traced: asked of the example's value."""
    if is_proxy(value):
        found = value.value  # type: ignore[attr-defined]
        if found is not UNKNOWN:
            _guard_kind(value, found)
            value = found
    return isinstance(value, kinds)


def _guard_kind(proxy: Any, value: object) -> None:
    """Let each call's argument be of the kind that was asked for."""
    asked = any(user.target is check_kind for user in proxy.node.users)
    if proxy.tracer.is_given(proxy.node) and not asked:
        proxy.tracer.guard(check_kind, proxy, kind_of(value), proxy.node.name)


def admitting_isinstance(value: object, kinds: Any) -> bool:
    """The same, but who asks whether it is being traced is told so.

    Transformers asks, and then builds attention masks whatever their values.
    """
    return (kinds is fx.Proxy and is_proxy(value)) or value_isinstance(value, kinds)


def holds_proxy(values: Iterable[Any]) -> bool:
    """Whether a proxy is among values or the members of their tuples, lists, dicts and slices."""
    return any(
        is_proxy(value)
        or (type(value) in (tuple, list, torch.Size) and holds_proxy(value))
        or (type(value) is dict and holds_proxy(value.values()))
        or (type(value) is slice and holds_proxy((value.start, value.stop, value.step)))
        for value in values
    )
