"""Run a stage node by node and hand every value of known provenance to whoever wants it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..graph import called_name
from ..passes.aliasing import VIEWS, write_view
from ..passes.stage import NodeInfo, StageModule, info
from ..passes.tree import joined, stages, standalone


@dataclasses.dataclass(frozen=True)
class Site:
    """Where a value was computed: a node of a stage, or a layer that Python code called.

    ``path``: of the stage or layer in the model. ``turn``: how many calls of it came before.
    ``node``: None for a layer.
    """

    path: str
    turn: int
    node: fx.Node | None = None

    @property
    def info(self) -> NodeInfo:
        return NodeInfo(layer=self.path) if self.node is None else info(self.node)

    @property
    def place(self) -> tuple[str, int | None]:
        """The same in every stage and every call."""
        return self.path, self.info.id

    @property
    def name(self) -> str:
        return self.path if self.node is None else joined(self.path, self.node.name)

    @property
    def layer(self) -> str:
        """Qualified name of the quantized layer that computed the value, or ``""``."""
        if self.node is None or not self.info.layer:
            return self.info.layer
        return joined(self.path, self.info.layer)

    @property
    def quantizer(self) -> str:
        """Qualified name of the quantizer whose indices the value is, or ``""``."""
        return joined(self.path, self.info.quantizer) if self.info.quantizer else ""


#: Called with a value's site and the value.
Watch = Callable[[Site, Any], None]


#: Calls whose values mean nothing until something is written into them.
_UNINITIALISED = frozenset({"empty", "empty_like", "empty_strided", "new_empty"})


def _means_nothing(node: fx.Node, value: Any) -> bool:
    """Whether there is nothing to compare: memory not yet written, or an argument's own object,
    which later nodes may change."""
    plain = isinstance(value, (torch.Tensor, tuple, list))
    given = (node.op == "placeholder" or node.target is getattr) and not plain
    return given or _is_unwritten(node)


def _is_unwritten(node: fx.Node) -> bool:
    """Whether some of it may be memory that nothing was written to yet."""
    while isinstance(source := next(iter(node.args), None), fx.Node) and _shares_memory(node):
        node = source
    return called_name(node) in _UNINITIALISED


def _shares_memory(node: fx.Node) -> bool:
    return node.target is write_view or called_name(node) in VIEWS


class NodeFailure(Exception):
    """A node of the stage under test raised; holds its site."""

    def __init__(self, site: Site, problem: Exception) -> None:
        first_line = (str(problem).splitlines() or [""])[0]
        super().__init__(first_line)
        self.site = site
        # fx appends to the arguments of an exception that passes through it; this stays.
        self.what = f"{type(problem).__name__}: {first_line}"


class _Recorder(fx.Interpreter):
    """Seeds the random state before each node by provenance, so that stages draw alike."""

    def __init__(self, stage: StageModule, path: str, watch: Watch) -> None:
        super().__init__(stage)
        self.path, self.watch, self.turn = path, watch, -1

    def run_with(self, arguments: dict[str, Any]) -> Any:
        """Run on forward's arguments by name, defaults filled in."""
        self.turn += 1
        before, self.given = getattr(self, "given", {}), arguments
        try:
            return self.run()
        finally:
            self.given = before

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.given[str(target).lstrip("*")]

    def run_node(self, n: fx.Node) -> Any:
        found, site = info(n), Site(self.path, self.turn, n)
        if found.id is not None:
            seed(found.id)
        try:
            value = super().run_node(n)
        except NodeFailure:
            raise
        except Exception as problem:
            raise NodeFailure(site, problem) from problem
        if found.id is not None and not _means_nothing(n, value):
            self.watch(site, value)
        return value


def seed(number: int) -> None:
    """``torch.manual_seed`` of the devices in use: for others it queues a call, with its stack."""
    torch.default_generator.manual_seed(number)
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is not None:
        device: Any = torch.get_device_module(kind)
        if getattr(device, "is_initialized", lambda: True)():
            getattr(device, "manual_seed_all", device.manual_seed)(number)


@contextmanager
def recording(model: nn.Module, watch: Watch) -> Iterator[None]:
    """While open, calling ``model`` tells ``watch`` the value of every node of its stages, and of
    every standalone layer.

    Stages are called as ever (hooks, a user's own ``forward(model, batch)``), which is why their
    ``forward`` is replaced rather than the call.
    """
    with ExitStack() as stack:
        for path, stage in stages(model).items():
            stack.enter_context(_recorded(stage, path, watch))
        for path, layer in standalone(model).items():
            handle = layer.register_forward_hook(_teller(path, watch))
            stack.callback(handle.remove)
        yield


@contextmanager
def _recorded(stage: StageModule, path: str, watch: Watch) -> Iterator[None]:
    signature = inspect.signature(stage.forward)
    recorder = _Recorder(stage, path, watch)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return recorder.run_with(dict(bound.arguments))

    vars(forward)["__signature__"] = signature  # run_batch reads it
    stage.__dict__["forward"] = forward
    try:
        yield
    finally:
        del stage.__dict__["forward"]


def _teller(path: str, watch: Watch) -> Callable[..., None]:
    turns = iter(range(2**62))

    def tell(module: nn.Module, args: Any, result: Any) -> None:
        watch(Site(path, next(turns)), result)

    return tell
