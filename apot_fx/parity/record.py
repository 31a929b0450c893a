"""Run a stage node by node and hand every value of known provenance to whoever wants it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ..passes.stage import NodeInfo, StageModule, info

#: Called with a node, its NodeInfo, its positional arguments and its value.
Watch = Callable[[fx.Node, NodeInfo, tuple[Any, ...], Any], None]


class NodeFailure(Exception):
    """A node of the stage under test raised; holds the node."""

    def __init__(self, node: fx.Node, problem: Exception) -> None:
        first_line = (str(problem).splitlines() or [""])[0]
        super().__init__(first_line)
        self.node = node
        # fx appends to the arguments of an exception that passes through it; this stays.
        self.what = f"{type(problem).__name__}: {first_line}"


class _Recorder(fx.Interpreter):
    """Seeds the random state before each node by provenance, so that stages draw alike."""

    def __init__(self, stage: StageModule, watch: Watch) -> None:
        super().__init__(stage)
        self.watch = watch

    def run_node(self, n: fx.Node) -> Any:
        found = info(n)
        if found.id is not None:
            torch.manual_seed(found.id)
        try:
            args, _ = self.fetch_args_kwargs_from_env(n)
            value = super().run_node(n)
        except Exception as problem:
            raise NodeFailure(n, problem) from problem
        if found.id is not None:
            self.watch(n, found, args, value)
        return value


@contextmanager
def recording(stage: StageModule, watch: Watch) -> Iterator[None]:
    """While open, calling ``stage`` runs it node by node and tells ``watch`` every value.

    The stage is called as ever (hooks, a user's own ``forward(model, batch)``), which is why its
    ``forward`` is replaced rather than the call.
    """
    signature = inspect.signature(stage.forward)
    recorder = _Recorder(stage, watch)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return recorder.run(*bound.args, *bound.kwargs.values())

    vars(forward)["__signature__"] = signature  # run_batch reads it
    stage.__dict__["forward"] = forward
    try:
        yield
    finally:
        del stage.__dict__["forward"]
