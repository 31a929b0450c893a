"""``StageModule``: the GraphModule of every stage, which keeps what plain GraphModules lose.

A plain ``GraphModule`` retraces when unpickled (nodes are renamed, ``node.meta`` is lost), drops
modules no node references, and forgets the user's class. A stage keeps all three, since
provenance, checkpoints and ``model.generate`` depend on them.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as functional
from torch import fx, nn

from ..batches import Forward
from ..errors import StateError, TensorError, did_you_mean
from ..fake_quant import FakeQuantize
from ..graph import argument
from .report import PassReport

META = "apot"

#: ``node.meta`` flags: never erase; may share memory with something written in place.
KEPT_FLAGS = ("keep", "pinned")


@dataclasses.dataclass(frozen=True)
class NodeInfo:
    """What every pass copies along with a node (``node.meta["apot"]``).

    ``id``: provenance, the same in every stage for the same value; None for a node whose value
    only one stage has. ``origin``: ``file:line`` of the user's code. ``layer``: qualified name of
    the quantized layer that computed the value. ``quantizer``: name of the fake-quant or
    quantizer whose grid the value lies on. ``reason``: why the node stays float.
    """

    id: int | None = None
    origin: str = ""
    layer: str = ""
    quantizer: str = ""
    reason: str = ""


@dataclasses.dataclass
class Work:
    """Multiply-adds of a batch: of quantized and of other layers, of products of activations."""

    quantized: int = 0
    float_layers: int = 0
    products: int = 0


@dataclasses.dataclass
class StageInfo:
    """What a stage knows about itself beside its graph."""

    kind: str  # "traced", "prepared" or "converted"
    origin: type[nn.Module]  # the user's class
    reports: list[PassReport] = dataclasses.field(default_factory=list)
    opaque: dict[str, str] = dataclasses.field(default_factory=dict)  # untraced module → why
    ids: int = 0  # how many provenance ids its nodes have been given
    positional: int = 0  # how many arguments example_inputs passed by position
    work: Work | None = None  # of calibrate's first batch
    forward: Forward | None = None  # how calibrate ran a batch; not pickled

    def __deepcopy__(self, memo: dict[int, Any]) -> StageInfo:
        reports = copy.deepcopy(self.reports, memo)
        return dataclasses.replace(self, reports=reports, opaque=dict(self.opaque))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "forward": None, "origin": _importable(self.origin)}


def info(node: fx.Node) -> NodeInfo:
    """The node's :class:`NodeInfo` (an empty one for a node made outside the passes)."""
    found = node.meta.get(META)
    return found if isinstance(found, NodeInfo) else NodeInfo()


def set_info(node: fx.Node, base: NodeInfo | None = None, **changes: Any) -> None:
    """Give a node a :class:`NodeInfo`: ``base`` (by default its own) with changes."""
    node.meta[META] = dataclasses.replace(info(node) if base is None else base, **changes)


def inputs_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """The values an operator call computes from: its first argument, or that tuple's members."""
    return tuple(value for value in as_tuple(argument(node, 0, "")) if isinstance(value, fx.Node))


def grids_of(node: fx.Node) -> tuple[tuple[fx.Node, fx.Node | None], ...]:
    """For each input of a prepared call the fake-quant module that is passed along with it."""
    inputs = inputs_of(node)
    return tuple(zip_longest(inputs, as_tuple(argument(node, 1, ""))[: len(inputs)]))


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A tuple itself, and one of anything else: inputs come alone or as a tuple."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def next_id(graph: fx.Graph) -> int:
    """A provenance id that no node of a stage's graph has had."""
    stage = graph.owning_module
    assert isinstance(stage, StageModule)
    stage.apot.ids += 1
    return stage.apot.ids - 1


#: Ends of the names under which nn.Module keeps hooks: the user's travel along.
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


class StageModule(fx.GraphModule):
    """A traced, prepared or converted model.

    ``apot`` is its :class:`StageInfo`. Methods and class attributes of the user's class (other
    than ``forward``) stay reachable.
    """

    apot: StageInfo

    def __init__(self, root: nn.Module, graph: fx.Graph, kind: str) -> None:
        super().__init__(root, graph, class_name=type(root).__name__)
        for registry in ("_modules", "_parameters", "_buffers"):
            getattr(self, registry).update(getattr(root, registry))
        # Constants of the trace (``torch.tensor(…)`` in a forward) are no keys of the user's model.
        self._non_persistent_buffers_set.update(
            root._non_persistent_buffers_set, self._buffers.keys() - root._buffers.keys()
        )
        taken = set(self.__dict__) | set(dir(fx.GraphModule))
        plain = {k: v for k, v in root.__dict__.items() if k not in taken or k.endswith(_HOOKS)}
        self.__dict__.update(plain)
        self.training = root.training
        self.apot = StageInfo(kind, getattr(root, "float_type", type(root)))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The user's class, for Python code around a stage that asks ``isinstance``."""
        known = self.__dict__.get("apot")
        return type(self) if known is None else known.origin

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            state = self.__dict__.get("apot")
            if state is None or name.startswith("__"):
                raise
            found = inspect.getattr_static(state.origin, name, None)
            if found is None:
                raise
            return found.__get__(self, type(self)) if hasattr(found, "__get__") else found

    def __deepcopy__(self, memo: dict[int, Any]) -> StageModule:
        clone = StageModule.__new__(StageModule)
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        clone.graph = clone.__dict__["_graph"]
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        state = {k: v for k, v in self.__dict__.items() if k not in _REBUILT}
        return _rebuild, (_dump_graph(self.graph), state)

    def load_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, but checked as a whole first: a bad state_dict changes nothing.

        A float checkpoint (no quantizer key at all) leaves every quantizer as it is. Raises
        StateError naming the key: missing, unknown, wrong shape, NaN α, index beyond the set.
        """
        checked: dict[str, Any] = OrderedDict(state_dict)
        metadata = getattr(state_dict, "_metadata", None)
        if metadata is not None:
            checked._metadata = metadata  # type: ignore[attr-defined]
        keep_quantizers(self, checked, "")
        self._check_keys(checked, strict)
        self._check_state(checked, "")
        return super().load_state_dict(checked, strict, assign)

    def _load_from_state_dict(  # type: ignore[override]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # Also reached where a stage is part of a larger model that is loaded.
        keep_quantizers(self, state_dict, prefix)
        self._check_state(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_keys(self, state_dict: Mapping[str, Any], strict: bool) -> None:
        own = self.state_dict()
        for key in state_dict:
            if strict and key not in own:
                hint = did_you_mean(key, own)
                raise StateError(f"state_dict not loaded: {key!r} is no key of this stage.{hint}")
        for key, value in own.items():
            if key not in state_dict:
                if strict and not key.endswith("num_batches_tracked"):
                    raise StateError(f"state_dict not loaded: {key!r} is missing")
                continue
            given = state_dict[key]
            if not isinstance(given, torch.Tensor):
                raise StateError(f"state_dict not loaded: {key!r} is no tensor")
            if given.shape != value.shape and not key.endswith("_extra_state"):
                raise StateError(
                    f"state_dict not loaded: {key!r} has shape {tuple(given.shape)}, "
                    f"expected {tuple(value.shape)}"
                )

    def _check_state(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        """Let every part refuse bad values before any is copied."""
        for name, module in self.named_modules():
            check = getattr(module, "check_state", None)
            if check is None:
                continue
            where = f"{prefix}{name}."
            part = {k[len(where) :]: v for k, v in state_dict.items() if k.startswith(where)}
            try:
                check(part)
            except (TensorError, StateError) as problem:
                raise StateError(f"state_dict not loaded: {where}{problem}") from None


def keep_quantizers(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A float checkpoint (no quantizer key at all) leaves every quantizer as it is.

    Also a load hook of modules that hold stages without being one.
    """
    own: dict[str, Any] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, FakeQuantize):
            own.update(part.state_dict(prefix=f"{prefix}{name}."))
    if not any(key in state_dict for key in own):
        state_dict.update(own)


_REBUILT = frozenset({"_graph", "_code", "_lineno_map", "_prologue_start"})


def _rebuild(graph: bytes, state: dict[str, Any]) -> StageModule:
    stage = StageModule.__new__(StageModule)
    stage.__dict__.update(state)
    stage.graph = pickle.loads(graph)
    return stage


def _importable(origin: type[nn.Module]) -> type[nn.Module]:
    """The user's class, or nn.Module for one defined inside a function, which pickle can't name."""
    return nn.Module if "<locals>" in origin.__qualname__ else origin


def _dump_graph(graph: fx.Graph) -> bytes:
    """Pickle a graph by itself: node names and our meta, without owner and without user types."""
    clone = copy.deepcopy(graph)
    for node in clone.nodes:
        node.meta = {k: v for k, v in node.meta.items() if k.startswith(META) or k in KEPT_FLAGS}
    clone._tracer_cls = None
    buffer = io.BytesIO()
    _GraphPickler(buffer).dump(clone)
    return buffer.getvalue()


class _GraphPickler(pickle.Pickler):
    """Pickles the kinds of call target that pickle can't name by itself."""

    def reducer_override(self, target: Any) -> Any:
        if isinstance(target, torch._ops.OpOverload):
            return _operator, (target.namespace, target._opname, target._overloadname)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return _higher_order_operator, (target._name,)
        if "<locals>" in getattr(target, "__qualname__", ""):
            names = [k for k, v in vars(functional).items() if v is target]
            if names:
                return _functional, (names[0],)
        return NotImplemented


def _functional(name: str) -> Any:
    return getattr(functional, name)


def _higher_order_operator(name: str) -> Any:
    return getattr(torch.ops.higher_order, name)


def _operator(namespace: str, name: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)
