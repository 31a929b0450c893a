"""Trace a model into a ``StageModule``: the first step of prepare.

Beyond ``torch.fx``'s tracer: buffers are graph inputs (so that in-place updates of them show),
``self.training`` handed to a functional dropout is recognised, optional arguments take their
defaults, and a submodule that can't be followed becomes a leaf with a reason.
"""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..errors import TraceError
from ..fake_quant import FakeQuantize
from ..graph import argument, called_name, user_line
from ..nn import ConvertedOp, PreparedOp, Quantize, ThroughFloat
from .mutation import AUGMENTED
from .report import PassReport
from .stage import NodeInfo, StageModule, set_info

#: ``node.meta`` key: which module's training flag the call follows.
TRAINING_OF = "apot_training_of"

_OURS = (PreparedOp, ConvertedOp, Quantize, ThroughFloat, FakeQuantize)


class TrainingFlag(int):
    """Stands in for ``module.training`` while tracing, and knows whose it is."""

    owner: str
    branches: list[str]

    def __new__(cls, value: bool, owner: str, branches: list[str]) -> TrainingFlag:
        flag = super().__new__(cls, value)
        flag.owner, flag.branches = owner, branches
        return flag

    def __bool__(self) -> bool:
        frame = traceback.extract_stack(limit=2)[0]
        self.branches.append(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}")
        return int(self) != 0


class ApotProxy(fx.Proxy):
    """Records ``x += y`` and ``x[i] = y``; fx's own proxy takes the first for ``x + y``."""

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _augmented(target: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _target in AUGMENTED:
    setattr(ApotProxy, f"__{_target.__name__}__", _augmented(_target))


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
        self.record_stack_traces = True
        self.leaf_types = tuple(leaf for leaf in chosen if isinstance(leaf, type))
        self.leaf_names = {leaf for leaf in chosen if isinstance(leaf, str)}
        self.given: frozenset[str] = frozenset()  # optional arguments that stay inputs
        self.failed_in: str | None = None  # innermost module that could not be followed

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ApotProxy(node, self)

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
            return super().iter(obj)
        places = [(obj, place) for place in range(count)]
        return iter(
            [self.create_proxy("call_function", operator.getitem, pair, {}) for pair in places]
        )

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            isinstance(m, (*_OURS, *self.leaf_types))
            or module_qualified_name in self.leaf_names
            or super().is_leaf_module(m, module_qualified_name)
        )

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed_in is None:
                self.failed_in = self.path_of_module(m)
            raise

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Placeholders for the signature; options (None, bool, str) are fixed at their default."""
        fn, args = super().create_args_for_root(root_fn, is_module, concrete_args)
        parameters = inspect.signature(inspect.unwrap(root_fn)).parameters
        return fn, [self._fix_option(arg, parameters) for arg in args]

    def _fix_option(self, arg: Any, parameters: Mapping[str, inspect.Parameter]) -> Any:
        if not isinstance(arg, fx.Proxy) or arg.node.op != "placeholder":
            return arg
        name = str(arg.node.target)
        parameter = parameters.get(name)
        if parameter is None or name in self.given:
            return arg
        default = parameter.default
        if default is not None and not isinstance(default, (bool, str)):
            return arg
        guard = self.create_proxy("call_function", check_option, (arg, default, name), {})
        guard.node.meta["keep"] = True
        return default


def check_option(value: object, default: object, name: str) -> None:
    """Graph node: an option that the trace has fixed must be passed as it was traced.

    Raises TraceError otherwise.
    """
    if value is not default and not (isinstance(value, str) and value == default):
        raise TraceError(
            f"argument {name!r} was traced at its default {default!r} and is now given; "
            f"pass example_inputs that hold {name!r} to prepare_apot"
        )


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    leaf_modules: Iterable[type[nn.Module] | str] = (),
) -> StageModule:
    """Trace ``model`` (taken over, not copied) into a stage of kind ``"traced"``.

    Raises TraceError where the model's own forward can't be followed.
    """
    leaves: dict[str, str] = {}
    given = _given_options(model, example_inputs)
    while True:
        tracer = ApotTracer([*leaf_modules, *leaves])
        tracer.given = given
        branches: list[str] = []
        try:
            with _training_flags(model, branches):
                graph = tracer.trace(model)
        except Exception as problem:
            name = tracer.failed_in
            why = f"untraceable at {_where(problem)}: {_first_line(problem)}"
            if name is None or name in leaves:
                raise TraceError(
                    f"{type(model).__name__} can't be traced ({why}). Rewrite that line without "
                    "Python decisions on tensor values, or prepare the parts separately"
                ) from problem
            leaves[name] = why
            continue
        return _as_stage(model, graph, leaves, branches)


def _as_stage(
    model: nn.Module, graph: fx.Graph, leaves: Mapping[str, str], branches: Iterable[str]
) -> StageModule:
    for number, node in enumerate(graph.nodes):
        _settle_training_flags(node)
        reason = leaves.get(str(node.target), "") if node.op == "call_module" else ""
        set_info(node, NodeInfo(id=number, origin=user_line(node), reason=reason))
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
    stage = StageModule(model, graph, "traced")
    report = PassReport("trace")
    for name, why in leaves.items():
        report.leave(name, why)
    for line in dict.fromkeys(branches):
        mode = "train" if model.training else "eval"
        report.leave(line, f"`if self.training` decided once, as in {mode}")
    stage.apot.reports.append(report)
    return stage


@contextmanager
def _training_flags(model: nn.Module, branches: list[str]) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        for name, module in model.named_modules():
            module.__dict__["training"] = TrainingFlag(module.training, name, branches)
        yield
    finally:
        for module, training in before:
            module.__dict__["training"] = training


def _settle_training_flags(node: fx.Node) -> None:
    """Replace flags in a call's arguments by plain bools and note whose they were."""
    owners: list[str] = []

    def settle(value: Any) -> Any:
        if isinstance(value, TrainingFlag):
            owners.append(value.owner)
            return int(value) != 0
        return value

    node.args = tuple(settle(arg) for arg in node.args)
    node.kwargs = {key: settle(value) for key, value in node.kwargs.items()}
    if owners:
        node.meta[TRAINING_OF] = owners[0]


def _given_options(model: nn.Module, example_inputs: Any) -> frozenset[str]:
    """Names of the forward arguments that the example passes with a value other than None."""
    if example_inputs is None:
        return frozenset()
    args, kwargs = split_inputs(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as problem:
        raise TraceError(
            f"example_inputs don't fit {type(model).__name__}.forward"
            f"{inspect.signature(model.forward)}: {problem}"
        ) from None
    return frozenset(
        name for name, value in bound.arguments.items() if isinstance(value, torch.Tensor)
    )


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: tensor → ``(x,)``, dict → keywords, tuple → positions."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def _where(problem: BaseException) -> str:
    """``file.py:12`` of the last frame outside torch."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/apot_fx/" not in f.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
