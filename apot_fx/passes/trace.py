"""Trace a model into a ``StageModule``: the first step of prepare.

Beyond ``torch.fx``'s tracer: buffers are graph inputs (so that in-place updates of them show),
``self.training`` handed to a functional dropout is recognised, optional arguments are fixed under
a guard, example inputs let values flow along (see ``proxy``), and what can't be followed is left
in one piece, the smallest that can be: a function (see ``opaque_call``) or a submodule.
"""

from __future__ import annotations

import dataclasses
import inspect
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils import _pytree as pytree

from ..errors import TraceError
from ..fake_quant import FakeQuantize
from ..graph import KIND, argument, called_name, free_name, user_line
from ..nn import ConvertedOp, PreparedOp, Quantize, ThroughFloat
from .opaque_call import OpaqueCall, Place, Record, fingerprint, places_of
from .patches import AskingValues, ambient_state, recording_factories, region_depth
from .proxy import (
    DATA,
    UNKNOWN,
    ApotProxy,
    Untraceable,
    check_decision,
    hangs_on,
    holds_proxy,
    is_proxy,
    members,
)
from .purity import Attributes, random_state, watching_globals
from .report import PassReport
from .stage import NodeInfo, StageModule, set_info

#: ``node.meta`` key: which module's training flag the call follows.
TRAINING_OF = "apot_training_of"

_OURS = (PreparedOp, ConvertedOp, Quantize, ThroughFloat, FakeQuantize, OpaqueCall)

#: So many modules of one class failing means that all of its modules would.
_SAME_CLASS = 3


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
        self.example: inspect.BoundArguments | None = None
        self.by_name: frozenset[str] = frozenset()  # arguments that the example passes by name
        self.values: dict[fx.Node, Any] = {}
        self.failed_in: str | None = None  # innermost module that could not be followed
        self.inside: list[str] = []  # modules whose forward is being traced
        self.outside_state: dict[str, str] = {}  # module → what it reads or sets outside tensors
        self.concrete = 0  # above 0 while the example's values are computed
        self.opaque: list[str] = []  # names of OpaqueCalls that this trace registered
        self.in_function = ""  # the opaque function that runs on the example's values
        self.refused: list[Callable[..., Any]] = []  # functions that can't be called as a whole

    # Values of the example

    def value_of(self, node: fx.Node) -> Any:
        return self.values.get(node, UNKNOWN)

    def hangs_on(self, node: fx.Node) -> str:
        return hangs_on(node, self.values)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return ApotProxy(node, self)

    def create_proxy(  # type: ignore[override]
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any
    ) -> fx.Proxy:
        if kind.startswith("call"):
            self._check_region()
        made = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        if self.example is not None and kind != "placeholder":
            try:
                self.values[made.node] = self._compute(made.node)
            except BaseException:
                if not made.node.users:
                    self.graph.erase_node(made.node)
                raise
        return made

    def _check_region(self) -> None:
        if self.concrete == 0 and (region_depth() or ambient_state() != self.ambient):
            raise Untraceable("it switches autocast or gradients within its forward")

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = (fx.map_arg(_plain(a), self._known) for a in (node.args, node.kwargs))
        self.concrete += 1
        try:
            if node.op == "get_attr":
                return _attribute_at(self.root, str(node.target))
            if node.op == "call_module":
                module = self.root.get_submodule(str(node.target))
                with _plain_flags(module):
                    return module(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            target: Any = node.target
            return target(*args, **kwargs)
        finally:
            self.concrete -= 1

    def _known(self, node: fx.Node) -> Any:
        if node not in self.values:  # fx makes get_attr nodes of parameters by itself
            self.values[node] = self._compute(node)
        return self.values[node]

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.concrete:
            return attr_val
        found = super().getattr(attr, attr_val, parameter_proxy_cache)
        if is_proxy(found) and self.example is not None:
            self.values.setdefault(found.node, attr_val)
        return found

    def decide(self, condition: ApotProxy, outcome: Any, verb: str) -> Any:
        """The example's outcome, guarded; refused where the next batch may differ at any time."""
        if self.hangs_on(condition.node) == DATA:
            raise Untraceable("a Python decision on tensor values")
        if not any(user.target is check_decision for user in condition.node.users):
            frame = _user_frame()
            what = f"{frame} {verb} by {condition.node.name}"
            guard = self.create_proxy(
                "call_function", check_decision, (condition, outcome, what), {}
            )
            guard.node.meta["keep"] = True
        return outcome

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
        name = self.path_of_module(m)
        if self.is_leaf_module(m, name):
            return super().call_module(m, forward, args, kwargs)
        self.inside.append(name)
        before = random_state()
        try:
            result = super().call_module(m, forward, args, kwargs)
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
            call = OpaqueCall(function, args, kwargs)
            name = free_name(self.root, f"opaque_{function.__name__.strip('_')}")
            self.root.add_module(name, call)
            self.opaque.append(name)
            self.in_function = function.__name__
            before = fingerprint(call.constants)
            made = self.create_proxy("call_module", name, call.take_traced(), {})
            if before is None or fingerprint(call.constants) != before:
                raise Untraceable(f"{function.__name__} changes what it is called with")
            return made
        except Untraceable:
            self.refused.append(function)
            raise
        finally:
            self.in_function = ""

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
        if not is_module or "forward" in self.root.__dict__:
            raise Untraceable("forward is replaced on the instance")
        signature = inspect.signature(inspect.unwrap(root_fn))
        given = self.example.arguments if self.example is not None else {}
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for parameter in list(signature.parameters.values())[1:]:
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional.extend(self._variable(f"*{parameter.name}", given))
            elif parameter.kind is parameter.VAR_KEYWORD:
                keywords.update(self._variable_keywords(parameter.name, given))
            else:
                self._add_argument(parameter, given, positional, keywords)

        def call(root: nn.Module, *args: Any) -> Any:
            return root_fn(root, *args, **keywords)

        return call, [self.root, *positional]

    def _add_argument(
        self,
        parameter: inspect.Parameter,
        given: Mapping[str, Any],
        positional: list[Any],
        keywords: dict[str, Any],
    ) -> None:
        """Pass an argument as the example does; one that it leaves out is left out here too."""
        argument = self._argument(parameter, given)
        by_name = parameter.kind is parameter.KEYWORD_ONLY or parameter.name in self.by_name
        if by_name or (parameter.name not in given and self.example is not None):
            if parameter.name in given or is_proxy(argument):
                keywords[parameter.name] = argument
        else:
            positional.append(argument)

    def _placeholder(self, name: str, default: tuple[Any, ...], value: Any) -> fx.Proxy:
        made = self.create_proxy("placeholder", name, default, {})
        if self.example is not None:
            self.values[made.node] = value
        return made

    def _argument(self, parameter: inspect.Parameter, given: Mapping[str, Any]) -> Any:
        name, has_default = parameter.name, parameter.default is not parameter.empty
        value = given.get(name, parameter.default if has_default else UNKNOWN)
        default = (parameter.default,) if has_default and _is_plain(parameter.default) else ()
        if has_default and not default:
            default = (None,)
        made = self._placeholder(name, default, value)
        is_option = value is None or isinstance(value, (bool, str))
        if value is not UNKNOWN and (is_option or (name not in given and not _is_number(value))):
            fixed = None if default == (None,) and name not in given else value
            self._guard(check_option, made, fixed, name)
            return value
        return made

    def _variable(self, name: str, given: Mapping[str, Any]) -> Iterable[Any]:
        if self.example is None:
            raise Untraceable(f"{name} in the signature, without example_inputs")
        value = given.get(name[1:], ())
        made = self._placeholder(name, (), value)
        self._guard(check_count, made, len(value), name)
        return members(made, len(value))

    def _variable_keywords(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        value = given.get(name, {})
        made: Any = self._placeholder(f"**{name}", (), value)
        self._guard(check_keywords, made, sorted(value), name)
        return {
            key: made[key] if isinstance(item, (torch.Tensor, tuple, list, dict)) else item
            for key, item in value.items()
        }

    def _guard(self, check: Callable[..., None], made: fx.Proxy, *facts: Any) -> None:
        self.create_proxy("call_function", check, (made, *facts), {}).node.meta["keep"] = True


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


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


def check_option(value: object, fixed: object, name: str) -> None:
    """Graph node: an option that the trace has fixed must be passed as it was traced.

    Raises TraceError otherwise.
    """
    if value is not fixed and not (isinstance(value, str) and value == fixed):
        raise TraceError(
            f"argument {name!r} was traced as {fixed!r} and is now another; pass example_inputs "
            f"that hold {name!r} to prepare_apot"
        )


def check_count(values: tuple[Any, ...], count: int, name: str) -> None:
    """Graph node: as many ``*args`` as were traced; raises TraceError otherwise."""
    if len(values) != count:
        raise TraceError(
            f"{name}: traced with {count} of them, got {len(values)}; pass such example_inputs"
        )


def check_keywords(values: Mapping[str, Any], names: list[str], name: str) -> None:
    """Graph node: the same ``**kwargs`` as were traced; raises TraceError otherwise."""
    if sorted(values) != names:
        odd = sorted(set(values) ^ set(names))
        raise TraceError(
            f"**{name}: {', '.join(odd)} given otherwise than while tracing; pass example_inputs "
            "that hold the same keyword arguments"
        )


@dataclasses.dataclass
class _Attempts:
    """What has to stay in one piece, learned from failed traces."""

    modules: dict[str, str] = dataclasses.field(default_factory=dict)  # path → reason
    functions: dict[types.CodeType, list[Place]] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)  # function's name → reason
    banned: set[types.CodeType] = dataclasses.field(default_factory=set)

    def learn(self, model: nn.Module, tracer: ApotTracer, problem: Exception) -> None:
        """Name what failed, function before module; raises TraceError where it is the root."""
        why = f"untraceable at {_where(problem)}: {_first_line(problem)}"
        if self._ban(tracer) or (tracer.example and self._learn_function(problem, why)):
            return
        name = tracer.failed_in
        if not name or name in self.modules:
            raise TraceError(
                f"{type(model).__name__} can't be traced ({why}). Rewrite that line without "
                "Python decisions on tensor values, or prepare the parts separately"
            ) from problem
        self.modules[name] = why
        kind = type(model.get_submodule(name))
        alike = [path for path, module in model.named_modules() if type(module) is kind]
        if sum(path in self.modules for path in alike) >= _SAME_CLASS:
            for path in alike:
                self.modules.setdefault(path, why)

    def _ban(self, tracer: ApotTracer) -> bool:
        """Forget functions that turned out not to be callable as a whole."""
        codes = {inspect.unwrap(function).__code__ for function in tracer.refused}
        self.banned |= codes
        for code in codes:
            self.reasons.pop(f"{code.co_name}()", None)
        return bool([code for code in codes if self.functions.pop(code, None)])

    def _learn_function(self, problem: Exception, why: str) -> bool:
        """Whether some function below the innermost module can be called as a whole."""
        frames = [frame for frame, _ in traceback.walk_tb(problem.__traceback__)]
        inner = 1 + max(
            (n for n, f in enumerate(frames) if f.f_code is ApotTracer.call_module.__code__),
            default=-1,
        )
        for place in range(len(frames) - 1, inner, -1):
            code = frames[place].f_code
            if _is_ours(frames[place]) or code in self.banned or code in self.functions:
                continue
            found = places_of(frames[place], frames[inner:place][::-1])
            if found:
                self.functions[code] = found
                self.reasons[f"{code.co_name}()"] = why
                return True
        return False


def _is_ours(frame: types.FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in ("/torch/", "/apot_fx/", "<"))


@contextmanager
def _opaque_functions(tracer: ApotTracer, attempts: _Attempts) -> Iterator[None]:
    """While open, the functions named in ``attempts`` are recorded as one call each."""
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for variables, name in [place for found in attempts.functions.values() for place in found]:
            function = variables[name]
            before.append((variables, name, function))
            variables[name] = _recorded(tracer, function)
        yield
    finally:
        for variables, name, function in before:
            variables[name] = function


def _recorded(tracer: ApotTracer, function: Callable[..., Any]) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        if tracer.concrete or not _any_proxy(args, kwargs):
            return function(*args, **kwargs)
        return tracer.call_opaquely(function, args, kwargs)

    return record


def _any_proxy(args: Any, kwargs: Any) -> bool:
    return holds_proxy(args) or holds_proxy(kwargs.values())


def trace(
    model: nn.Module,
    example_inputs: Any = None,
    leaf_modules: Iterable[type[nn.Module] | str] = (),
) -> StageModule:
    """Trace ``model`` (taken over, not copied) into a stage of kind ``"traced"``.

    Raises TraceError where the model's own forward can't be followed.
    """
    example = _bind(model, example_inputs)
    attempts = _Attempts()
    before = Attributes(model)
    while True:
        tracer = ApotTracer([*leaf_modules, *attempts.modules])
        tracer.example = _copied(example)
        tracer.by_name = frozenset(split_inputs(example_inputs)[1])
        branches: list[tuple[str, str]] = []
        try:
            graph = _attempt(model, tracer, attempts, branches)
        except Exception as problem:
            before.restore()
            attempts.learn(model, tracer, problem)
            continue
        kept = {name: model._modules.pop(name) for name in tracer.opaque}
        constants = _take_constants(model)
        changed = {n: k for n, k in before.changed().items() if n not in attempts.modules}
        before.restore()
        if changed:
            _settle_changed(model, attempts, changed)
            continue
        both_ways = _switched_without_layers(model, branches)
        if both_ways:
            attempts.modules.update(both_ways)
            continue
        model._modules.update(kept)
        for name, value in constants.items():
            setattr(model, name, value)
        return _as_stage(model, graph, tracer, attempts, branches)


def _settle_changed(model: nn.Module, attempts: _Attempts, changed: dict[str, str]) -> None:
    if "" in changed:
        raise TraceError(
            f"{type(model).__name__} can't be traced: its forward sets the attribute "
            f"{changed['']!r}"
        )
    for name, key in changed.items():
        attempts.modules[name] = f"its forward sets the attribute {key!r}"


def _switched_without_layers(
    model: nn.Module, branches: Iterable[tuple[str, str]]
) -> dict[str, str]:
    """Submodules without parameters that ask for the mode: as leaves they go on following it."""
    return {
        owner: f"decides by self.training at {line}"
        for owner, line in branches
        if owner and next(model.get_submodule(owner).parameters(), None) is None
    }


def _take_constants(model: nn.Module) -> dict[str, Any]:
    """Tensors that the trace found outside of the model's parameters and buffers."""
    names = [name for name in model.__dict__ if name.startswith("_tensor_constant")]
    return {name: model.__dict__.pop(name) for name in names}


def _attempt(
    model: nn.Module, tracer: ApotTracer, attempts: _Attempts, branches: list[tuple[str, str]]
) -> fx.Graph:
    def branched(owner: str, line: str) -> None:
        if not tracer.concrete:
            branches.append((owner, line))

    asking = AskingValues()
    with (
        torch.random.fork_rng(enabled=tracer.example is not None),
        _training_flags(model, branched),
        recording_factories(tracer),
        _opaque_functions(tracer, attempts),
        watching_globals(tracer.notice_outside_state, asking.visit),
    ):
        before = random_state()
        try:
            graph = tracer.trace(model)
        finally:
            asking.restore()
        if random_state() != before:
            raise Untraceable("it draws random numbers of Python or NumPy")
        if "" in tracer.outside_state:
            raise Untraceable(f"it {tracer.outside_state['']}")
    return graph


def _as_stage(
    model: nn.Module,
    graph: fx.Graph,
    tracer: ApotTracer,
    attempts: _Attempts,
    branches: Iterable[tuple[str, str]],
) -> StageModule:
    for number, node in enumerate(graph.nodes):
        _settle_training_flags(node)
        reason = attempts.modules.get(str(node.target), "") if node.op == "call_module" else ""
        set_info(node, NodeInfo(id=number, origin=user_line(node), reason=reason))
        node.meta.pop("stack_trace", None)
        node.meta.pop("nn_module_stack", None)
        if node in tracer.values:
            node.meta[KIND] = _kind(tracer.values[node])
    stage = StageModule(model, graph, "traced")
    report = PassReport("trace")
    for name, why in attempts.modules.items():
        report.leave(name, why)
    for name, why in attempts.reasons.items():
        report.leave(name, why)
    for line in dict.fromkeys(line for _, line in branches):
        mode = "train" if model.training else "eval"
        report.leave(line, f"`if self.training` decided once, as in {mode}")
    stage.apot.reports.append(report)
    return stage


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "tensor"
    several = isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)
    return "tuple" if several and all(isinstance(v, torch.Tensor) for v in value) else "other"


@contextmanager
def _training_flags(model: nn.Module, branched: Callable[[str, str], None]) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        for name, module in model.named_modules():
            module.__dict__["training"] = TrainingFlag(module.training, name, branched)
        yield
    finally:
        for module, training in before:
            module.__dict__["training"] = training


@contextmanager
def _plain_flags(module: nn.Module) -> Iterator[None]:
    """While open, a leaf that is run on values has plain training flags: torch's calls want bools.

    So have the modules that an opaque function is given.
    """
    given = module.constants if isinstance(module, OpaqueCall) else ()
    roots = [module, *(m for m in given if isinstance(m, nn.Module))]
    flagged = [m for root in roots for m in root.modules()]
    before = [(m, m.training) for m in flagged if isinstance(m.training, TrainingFlag)]
    try:
        for m, training in before:
            m.__dict__["training"] = int(training) != 0
        yield
    finally:
        for m, training in before:
            m.__dict__["training"] = training


def _plain(arguments: Any) -> Any:
    """Arguments with plain bools for training flags."""
    return fx.node.map_aggregate(
        arguments, lambda arg: int(arg) != 0 if isinstance(arg, TrainingFlag) else arg
    )


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


def _bind(model: nn.Module, example_inputs: Any) -> inspect.BoundArguments | None:
    """The example's arguments by name, tensors copied; None without an example."""
    if example_inputs is None:
        return None
    args, kwargs = split_inputs(example_inputs)
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as problem:
        raise TraceError(
            f"example_inputs don't fit {type(model).__name__}.forward"
            f"{inspect.signature(model.forward)}: {problem}"
        ) from None
    return bound


def _copied(example: inspect.BoundArguments | None) -> inspect.BoundArguments | None:
    """The example with copies of its tensors: a forward may write into its inputs."""
    if example is None:
        return None

    def copied(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, torch.Tensor) else value

    arguments = {key: pytree.tree_map(copied, v) for key, v in example.arguments.items()}
    return inspect.BoundArguments(example.signature, arguments)  # type: ignore[arg-type]


def split_inputs(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: tensor → ``(x,)``, dict → keywords, tuple → positions."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def _user_frame() -> str:
    """``file.py:12`` of the innermost running line outside torch and apot_fx."""
    for frame in reversed(traceback.extract_stack()):
        if not any(part in frame.filename for part in ("/torch/", "/apot_fx/")):
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return ""


def _where(problem: BaseException) -> str:
    """``file.py:12`` of the last frame outside torch."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/apot_fx/" not in f.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
