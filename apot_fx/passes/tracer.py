"""``ApotTracer``: ``torch.fx``'s tracer that follows an example's values."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from ..fake_quant import FakeQuantize
from ..graph import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, argument, called_name, free_name
from ..nn import ConvertedOp, PreparedOp, Quantize, ThroughFloat
from .arguments import RootArguments
from .dependence import DATA, SIZE, hangs_on
from .example import Call
from .guards import check_decision
from .lines import LINE, running_line
from .opaque_call import OpaqueCall, Record, fingerprint, without_parts
from .patches import ambient_state, region_depth
from .proxy import (
    UNKNOWN,
    ApotProxy,
    is_proxy,
    members,
)
from .purity import random_state
from .refusal import Untraceable
from .training_flags import plain, plain_flags

_OURS = (PreparedOp, ConvertedOp, Quantize, ThroughFloat, FakeQuantize, OpaqueCall)


class ApotTracer(fx.Tracer):
    """``torch.fx.Tracer`` that also keeps apot_fx's own modules, and chosen ones, as leaves.

    Args:
        leaf_modules: module types, or qualified names, that are called rather than traced into.

    >>> graph = ApotTracer(leaf_modules=[nn.Sequential]).trace(nn.Sequential(nn.ReLU()))
    >>> [node.op for node in graph.nodes]
    ['placeholder', 'call_module', 'output']
    """

    proxy_buffer_attributes = True

    def __init__(self, leaf_modules: Iterable[type[nn.Module] | str] = ()) -> None:
        super().__init__()
        chosen = tuple(leaf_modules)
        self.leaf_types = tuple(leaf for leaf in chosen if isinstance(leaf, type))
        self.leaf_names = {leaf for leaf in chosen if isinstance(leaf, str)}
        self.example: Call | None = None
        self.values: dict[fx.Node, Any] = {}
        self.tensor_names: dict[torch.Tensor, str] = {}  # the model's parameters and buffers
        self.failed_in: str | None = None  # innermost module that could not be followed
        self.inside: list[str] = []  # modules whose forward is being traced
        self.outside_state: dict[str, str] = {}  # module → what it reads or sets outside tensors
        self.concrete = 0  # above 0 while the example's values are computed
        self.opaque: list[str] = []  # names of OpaqueCalls that this trace registered
        self.in_function = ""  # the opaque function that runs on the example's values
        self.refused: list[Callable[..., Any]] = []  # functions that can't be called as a whole
        self.settles_sizes = True  # whether a decision on sizes may be taken as the example does
        self.admits = True  # whether code that asks is told that it is being traced
        self.refused_lines: frozenset[str] = frozenset()  # whose decisions can't be kept

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        try:
            return super().trace(root, concrete_args)
        finally:
            self.tensor_names = {}  # a tracer lives on in cycles: weights must not with it

    # Values of the example

    def value_of(self, node: fx.Node) -> Any:
        return self.values.get(node, UNKNOWN)

    def hangs_on(self, node: fx.Node) -> str:
        return hangs_on(node, self.values)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ApotProxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        # One line: fx's own record of the whole stack costs more than all else in tracing.
        node.meta[LINE] = running_line(fx.Tracer.trace.__code__)
        return node

    def create_proxy(  # type: ignore[override]
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> fx.Proxy:
        if kind.startswith("call"):
            self._check_region()
        if isinstance(target, torch._ops.OpOverloadPacket) and len(target.overloads()) == 1:
            target = getattr(target, target.overloads()[0])  # whose schema says what it writes
        if target in CONVOLUTIONS or target in TRANSPOSED_CONVOLUTIONS:
            args, kwargs = self._with_settled_geometry(args, kwargs)
        made = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if self.example is not None and kind != "placeholder":
            try:
                self.values[made.node] = self._compute(made.node)
            except BaseException:
                if not made.node.users:
                    self.graph.erase_node(made.node)
                raise
        return made

    def _with_settled_geometry(self, args: Any, kwargs: Any) -> Any:
        """Groups, padding and the like as numbers: with them in the graph it is no layer."""

        def settled(value: Any) -> Any:
            number = value.value if is_proxy(value) else None
            kept = type(number) is int and not self._refusal(value, running_line())
            return self.decide(value, number) if kept else value

        return pytree.tree_map(settled, (args, kwargs), is_leaf=is_proxy)

    def _check_region(self) -> None:
        if self.concrete == 0 and (region_depth() or ambient_state() != self.ambient):
            raise Untraceable("it switches autocast or gradients within its forward")

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = (fx.map_arg(plain(a), self._known) for a in (node.args, node.kwargs))
        self.concrete += 1
        try:
            with torch.no_grad():  # buffers that it writes stay leaves
                return self._called(node, args, kwargs)
        finally:
            self.concrete -= 1

    def _called(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "get_attr":
            return _attribute_at(self.root, str(node.target))
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            with plain_flags(module):
                return module(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target: Any = node.target
        return target(*args, **kwargs)

    def _known(self, node: fx.Node) -> Any:
        if node not in self.values:  # fx makes get_attr nodes of parameters by itself
            self.values[node] = self._compute(node)
        return self.values[node]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.concrete:
            if self.in_function and isinstance(attr_val, torch.Tensor):
                raise Untraceable(f"{self.in_function} reads the model's tensor {attr!r}")
            return attr_val
        # As fx does, which looks through all of the model's tensors in every call.
        name = self.tensor_names.get(attr_val) if isinstance(attr_val, torch.Tensor) else None
        if name is None:
            return attr_val
        if name not in parameter_proxy_cache:
            made = parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
            if self.example is not None:
                self.values.setdefault(made.node, attr_val)
        return parameter_proxy_cache[name]

    def decide(self, condition: ApotProxy, outcome: Any) -> Any:
        """The example's outcome, guarded; refused where the next batch may differ at any time."""
        line = running_line()
        refusal = self._refusal(condition, line)
        if refusal:
            raise Untraceable(refusal)
        if not any(user.target is check_decision for user in condition.node.users):
            self.guard(check_decision, condition, outcome, line)
        return outcome

    def _refusal(self, condition: ApotProxy, line: str) -> str:
        kind = self.hangs_on(condition.node)
        if kind == DATA:
            return "a Python decision on tensor values"
        if line in self.refused_lines:
            return "a Python decision that other sizes turn"
        if not self.settles_sizes and kind == SIZE:
            return "a Python decision on a size, in a module that Python code calls"
        return ""

    def guard(self, check: Callable[..., None], *facts: Any) -> None:
        """Record a check that every later call passes or is refused by."""
        made = self.create_proxy("call_function", check, facts, {})
        made.node.meta["keep"] = True

    def is_given(self, node: fx.Node) -> bool:
        """Whether a value is an argument, or a member of one, rather than computed."""
        while node.target in (operator.getitem, getattr) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node.op == "placeholder"

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """Let ``for part in x.chunk(2)`` run: the call says how many parts there are."""
        parts, count = obj.node, 0
        if called_name(parts) == "chunk":
            asked = argument(parts, 1, "chunks")
            count = asked if isinstance(asked, int) else 0
        elif called_name(parts) in ("split", "split_with_sizes"):
            asked = argument(parts, 1, "split_size")
            count = len(asked) if isinstance(asked, (list, tuple)) else 0
        if not count:
            raise Untraceable("iteration over a traced value")
        return iter(members(obj, count))

    # Modules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*_OURS, *self.leaf_types)) or module_qualified_name in self.leaf_names:
            return True
        if "forward" in m.__dict__:
            return False  # replaced on the instance: it computes what that says
        if is_parametrized(m):
            return False  # its class is a made one; the layer below it computes
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if self.concrete:
            if self.in_function and next(m.parameters(), None) is not None:
                raise Untraceable(f"{self.in_function} calls layers")
            return forward(*args, **kwargs)
        if not self._is_registered(m) and not m.state_dict():
            return forward(*args, **kwargs)  # made on the way: nothing but its forward
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(name)
        before, latest = random_state(), Untraceable.latest
        try:
            result = super().call_module(m, forward, args, kwargs)
            self.check_swallowed(latest)
            if random_state() != before:
                raise Untraceable("it draws random numbers of Python or NumPy")
            if name in self.outside_state:
                raise Untraceable(f"it {self.outside_state[name]}")
            return result
        except Exception:
            if self.failed_in is None:
                self.failed_in = name
            raise
        finally:
            self.inside.pop()

    def _is_registered(self, module: nn.Module) -> bool:
        return module in (self.submodule_paths or {})

    def check_swallowed(self, latest: tuple[int, str]) -> None:
        """Raise the refusal that was made since ``latest``: the forward caught it and went on."""
        count, message = Untraceable.latest
        if count != latest[0]:
            raise Untraceable(f"{message}, which its own except clause caught")

    def to_bool(self, obj: fx.Proxy) -> bool:
        raise Untraceable("a Python decision on a traced value")

    def keys(self, obj: fx.Proxy) -> Any:
        raise Untraceable("** of a traced value")

    def path_of_module(self, mod: nn.Module) -> str:
        try:
            return super().path_of_module(mod)
        except NameError:
            raise Untraceable(f"a {type(mod).__name__} that is no submodule") from None

    def notice_outside_state(self, what: str) -> None:
        if not self.concrete:
            self.outside_state.setdefault(self.inside[-1] if self.inside else "", what)

    def call_opaquely(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Record a call of a Python function that can't be followed."""
        try:
            stripped = pytree.tree_map(self._stripped, (args, kwargs), is_leaf=is_proxy)
            call = OpaqueCall(function, *stripped)
            for value in call.constants:  # a shell of the root, say: it follows the mode
                if isinstance(value, nn.Module) and not self._is_registered(value):
                    call.add_module("owner", value)
            call.train(int(self.root.training) != 0)
            name = free_name(self.root, f"opaque_{function.__name__.strip('_')}")
            self.root.add_module(name, call)
            self.opaque.append(name)
            self.in_function = function.__name__
            before = fingerprint(call.constants)
            made = self.create_proxy("call_module", name, call.take_traced(), {})
            if before is None or fingerprint(call.constants) != before:
                raise Untraceable(f"{function.__name__} changes what it is called with")
            call.gives_none = made.value is None
            made.node.meta["keep"] = call.gives_none
            return None if call.gives_none else made
        except Untraceable:
            self.refused.append(function)
            raise
        finally:
            self.in_function = ""

    def _stripped(self, value: Any) -> Any:
        """The root is not kept whole by the calls that get it: its layers have another place."""
        return without_parts(self.root) if value is self.root else value

    # Arguments

    def create_arg(self, a: Any) -> Any:
        if is_proxy(a):
            return a.node
        if dataclasses.is_dataclass(a) and not isinstance(a, type):
            fields = {f.name: getattr(a, f.name) for f in dataclasses.fields(a) if f.init}
            given = {key: value for key, value in fields.items() if value is not None}
            return self.create_proxy("call_function", Record(type(a), True), (), given).node
        if isinstance(a, Mapping) and type(a) is not dict:
            return self._create_mapping(a)
        state = getattr(a, "__dict__", None)
        if type(state) is dict and type(a).__module__.split(".")[0] != "torch" and _holds_deep(a):
            return self.create_proxy("call_function", Record(type(a), False), (), dict(state)).node
        return super().create_arg(a)

    def _create_mapping(self, a: Mapping[Any, Any]) -> Any:
        record = Record(type(a), True)
        return self.create_proxy("call_function", record, (dict(a),), {}).node

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the signature; options (None, bool, str) are fixed as they are."""
        self.ambient = ambient_state()
        tensors = [*self.root.named_buffers(), *self.root.named_parameters()]
        self.tensor_names = {tensor: name for name, tensor in tensors}
        if not is_module or "forward" in self.root.__dict__:
            raise Untraceable("forward is replaced on the instance")
        if any("__call__" in vars(kind) for kind in _own_classes(type(self.root))):
            raise Untraceable("its class has a __call__ of its own")
        signature = inspect.signature(inspect.unwrap(root_fn))
        positional, keywords = RootArguments(self, self.example).make(signature)

        def call(root: nn.Module, *args: Any) -> Any:
            return root_fn(root, *args, **keywords)

        return call, [self.root, *positional]


def _own_classes(kind: type) -> list[type]:
    """The classes of a module before nn.Module, torch's left out."""
    order = kind.__mro__
    before = order[: order.index(nn.Module)]
    return [one for one in before if not one.__module__.startswith("torch.")]


def _attribute_at(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _holds_deep(value: Any, depth: int = 4) -> bool:
    """Whether an object holds a proxy in its attributes, lists or dicts."""
    if is_proxy(value):
        return True
    if depth == 0 or isinstance(value, (nn.Module, type, types.FunctionType, torch.Tensor)):
        return False
    if isinstance(value, Mapping):
        return any(_holds_deep(item, depth - 1) for item in value.values())
    if isinstance(value, (tuple, list)):
        return any(_holds_deep(item, depth - 1) for item in value)
    state = getattr(value, "__dict__", None)
    return type(state) is dict and any(_holds_deep(item, depth - 1) for item in state.values())
