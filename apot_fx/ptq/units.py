"""Units: what is learned at once, blocks of graphs and layers that stand alone.

A unit is found in one copy of a model and works on any other by its paths and node names. It is
watched while the model runs (what goes in, what comes out) and run again on what was seen.
"""

from __future__ import annotations

import abc
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from ..graph import called_module
from ..passes.stage import StageModule
from ..passes.tree import stages
from .blocks import blocks
from .weights import Weight

#: Told of what a unit gets or gives in one call.
Tell = Callable[[Any], None]
#: What a unit of one model gives for what it gets.
Run = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Unit(abc.ABC):
    """``path``: the module whose calls are the unit's; ``weights``: names of what it decides;
    ``ahead``: of what is only learned along."""

    path: str
    weights: tuple[str, ...]
    ahead: tuple[str, ...]

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """For people."""

    @abc.abstractmethod
    def watch_inputs(self, model: nn.Module, tell: Tell) -> Any:
        """A context in which every call tells what it gets."""

    @abc.abstractmethod
    def watch_outputs(self, model: nn.Module, tell: Tell) -> Any:
        """A context in which every call tells what it gives."""

    @abc.abstractmethod
    def bound(self, model: nn.Module) -> Run:
        """The unit of a model, to be run on what was seen."""


class LayerUnit(Unit):
    """A layer that Python code calls, or several nodes."""

    @property
    def name(self) -> str:
        return self.path

    @contextmanager
    def watch_inputs(self, model: nn.Module, tell: Tell) -> Iterator[None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            tell((args, kwargs))

        layer = model.get_submodule(self.path)
        handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def watch_outputs(self, model: nn.Module, tell: Tell) -> Iterator[None]:
        layer = model.get_submodule(self.path)
        # Before a user's own hooks, which may change the result and are no part of the layer.
        handle = layer.register_forward_hook(lambda m, args, out: tell(out), prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def bound(self, model: nn.Module) -> Run:
        # Not the layer itself: a user's hooks have been told of the call.
        forward = model.get_submodule(self.path).forward
        return lambda inputs: forward(*inputs[0], **inputs[1])


@dataclasses.dataclass(frozen=True)
class BlockUnit(Unit):
    """A block of the stage at ``path``, by the names of its nodes."""

    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    end: str

    @property
    def name(self) -> str:
        weights = (*self.weights, *self.ahead)
        layers = list(dict.fromkeys(weight.rpartition(".")[0] for weight in weights))
        return layers[0] if len(layers) == 1 else f"{layers[0]} … {layers[-1]}"

    def watch_inputs(self, model: nn.Module, tell: Tell) -> Any:
        return self._watch(model, self.inputs, tell)

    def watch_outputs(self, model: nn.Module, tell: Tell) -> Any:
        return self._watch(model, (self.end,), lambda values: tell(values[0]))

    @contextmanager
    def _watch(self, model: nn.Module, names: tuple[str, ...], tell: Tell) -> Iterator[None]:
        """Forward is replaced rather than the call: hooks and keyword arguments stay."""
        stage = model.get_submodule(self.path)
        assert isinstance(stage, StageModule)
        signature = inspect.signature(stage.forward)

        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return _Watched(stage, names, tell, dict(bound.arguments)).run()

        vars(forward)["__signature__"] = signature  # run_batch reads it
        stage.__dict__["forward"] = forward
        try:
            yield
        finally:
            del stage.__dict__["forward"]

    def bound(self, model: nn.Module) -> Run:
        stage = model.get_submodule(self.path)
        assert isinstance(stage, StageModule)
        by_name = {node.name: node for node in stage.graph.nodes}
        given, nodes = ([by_name[name] for name in names] for names in (self.inputs, self.nodes))
        part = fx.Interpreter(stage, garbage_collect_values=False)

        def run(inputs: Any) -> Any:
            part.env = dict(zip(given, inputs, strict=True))
            for node in nodes:
                part.env[node] = part.run_node(node)
            found, part.env = part.env[by_name[self.end]], {}
            return found

        return run


class _Watched(fx.Interpreter):
    """Runs a graph on forward's arguments by name, and tells the values of some nodes."""

    def __init__(
        self, stage: StageModule, names: tuple[str, ...], tell: Tell, given: dict[str, Any]
    ) -> None:
        super().__init__(stage)
        self.tell, self.given = tell, given
        self.wanted, self.seen = names, dict[str, Any]()

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.given[str(target).lstrip("*")]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted:
            self.seen[n.name] = value
            if len(self.seen) == len(self.wanted):
                self.tell(tuple(self.seen[name] for name in self.wanted))
        return value


def find_units(model: nn.Module, weights: Mapping[str, Weight], order: list[str]) -> list[Unit]:
    """Units that hold every weight once, in the order in which their first layers run.

    ``order``: paths of the layers that run, as they do; weights of others are in no unit.
    """
    by_layer: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if weight.layer in order:
            by_layer.setdefault(weight.layer, []).append(name)
    units: list[Unit] = []
    taken: set[str] = set()
    for path, stage in stages(model).items():
        for block in blocks(stage, _calls(model, path, stage, by_layer.keys() - taken)):
            own, ahead = (
                tuple(name for layer in layers for name in by_layer[layer])
                for layers in (block.layers, block.ahead)
            )
            nodes = tuple(node.name for node in block.nodes)
            inputs = tuple(node.name for node in block.inputs())
            units.append(BlockUnit(path, own, ahead, nodes, inputs, block.end.name))
            taken.update(block.layers)
    for layer in by_layer.keys() - taken:
        units.append(LayerUnit(layer, tuple(by_layer[layer]), ()))
    place = {name: order.index(weights[name].layer) for unit in units for name in unit.weights}
    return sorted(units, key=lambda unit: min(place[name] for name in unit.weights))


def _calls(
    model: nn.Module, path: str, stage: StageModule, layers: Collection[str]
) -> dict[fx.Node, list[str]]:
    """Layers inside of what a node calls, by the node: those that no other node calls, too."""
    paths = {id(model.get_submodule(layer)): layer for layer in layers}
    found: dict[fx.Node, list[str]] = {}
    times: dict[str, int] = {}
    for node in stage.graph.nodes:
        called = called_module(stage, node)
        for part in () if called is None else called.modules():
            if id(part) in paths:
                layer = paths[id(part)]
                found.setdefault(node, []).append(layer)
                times[layer] = times.get(layer, 0) + 1
    return {
        node: own
        for node, layers in found.items()
        if (own := [layer for layer in layers if times[layer] == 1])
    }
