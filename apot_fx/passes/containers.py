"""Where the tensors of an exported module lie, and the live layers that take their places."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ..graph import free_name, set_submodule
from .aten_layers import LayerCall

_COUNTER = "num_batches_tracked"


class Exported(nn.Module):
    """A bare container of an exported module; a live layer may take its place."""


class Containers:
    """The containers of an exported module over again, holding the very same tensors.

    ``root``: the outermost; every tensor has its old key.
    """

    def __init__(self, exported: fx.GraphModule, graph: fx.Graph) -> None:
        self.exported = exported
        self.root = Exported()
        self.layers: dict[Any, str] = {}  # what a layer computes on which tensors → its path
        for path, module in exported.named_modules(remove_duplicate=False):
            if module._parameters or module._buffers:
                own = self._container(path)
                own._parameters.update(module._parameters)
                own._buffers.update(module._buffers)
                own._non_persistent_buffers_set |= module._non_persistent_buffers_set
        for node in graph.nodes:
            if node.op == "get_attr":
                self._add_constant(str(node.target))

    def _container(self, path: str) -> nn.Module:
        """The container at a path, made where there is none."""
        found: nn.Module = self.root
        for name in path.split(".") if path else ():
            if name not in found._modules:
                found.add_module(name, Exported())
            child = found._modules[name]
            assert child is not None
            found = child
        return found

    def _add_constant(self, target: str) -> None:
        """Tensors that are no parameter or buffer are no keys of the model: they go along."""
        path, _, name = target.rpartition(".")
        value = attribute_at(self.exported, target)
        owner = self._container(path)
        if isinstance(value, nn.Module):
            owner._modules.setdefault(name, _plain(value))
        elif name not in owner._parameters and name not in owner._buffers:
            owner.register_buffer(name, value, persistent=False)

    def is_live(self, path: str) -> bool:
        """Whether a live layer took the place of the container at a path."""
        return path in self.layers.values()

    def place(self, call: LayerCall, node: fx.Node) -> str:
        """Path of the live layer that serves a call; ``""`` where none can."""
        if not call.tensors:
            return self._place_without_tensors(call, node)
        given = {name: node for name, node in call.tensors.items() if node is not None}
        if any(not isinstance(n, fx.Node) or n.op != "get_attr" for n in given.values()):
            return ""
        tensors = {k: attribute_at(self.exported, str(n.target)) for k, n in given.items()}
        key = (call.key, tuple((name, id(tensor)) for name, tensor in sorted(tensors.items())))
        if key not in self.layers:
            first = next(iter(given.values()))
            for path in (_called_path(node)[0], str(first.target).rpartition(".")[0]):
                if self._is_home(path, tensors):
                    self._put(path, call, tensors)
                    self.layers[key] = path
                    break
        return self.layers.get(key, "")

    def _is_home(self, path: str, tensors: dict[str, torch.Tensor]) -> bool:
        """Whether the container at a path holds these tensors, and nothing else."""
        if not path or self.is_live(path):
            return False
        try:
            home = self.root.get_submodule(path)
        except AttributeError:
            return False
        held = {**home._parameters, **home._buffers}
        held = {k: v for k, v in held.items() if v is not None and k != _COUNTER}
        same = held.keys() == tensors.keys() and all(held[k] is tensors[k] for k in held)
        return type(home) is Exported and not home._modules and same

    def _put(self, path: str, call: LayerCall, tensors: dict[str, torch.Tensor]) -> None:
        home, layer = self.root.get_submodule(path), call.module()
        counter = home._buffers.get(_COUNTER)
        for name in [*layer._parameters, *layer._buffers]:  # recurrent layers notice setattr
            setattr(layer, name, counter if name == _COUNTER else tensors.get(name))
        layer._non_persistent_buffers_set |= home._non_persistent_buffers_set
        set_submodule(self.root, path, layer)

    def _place_without_tensors(self, call: LayerCall, node: fx.Node) -> str:
        """Dropout stands where it stood, or beside other functional ones at the root."""
        path, kind = _called_path(node)
        key = (call.key, path)
        if key in self.layers and kind.startswith("torch.nn."):
            return self.layers[key]
        if not kind.startswith("torch.nn.modules.dropout.") or not self._is_free(path):
            path = free_name(self.root, "functional_dropout")
        parent, _, name = path.rpartition(".")
        self._container(parent).add_module(name, call.module())
        self.layers[key] = path
        return path

    def _is_free(self, path: str) -> bool:
        parent, _, name = path.rpartition(".")
        steps = parent.split(".") if parent else []
        above = [self.root, *(self._at(steps[: n + 1]) for n in range(len(steps)))]
        plain = all(module is None or type(module) is Exported for module in above)
        last = above[-1]
        return bool(name) and plain and (last is None or not hasattr(last, name))

    def _at(self, steps: list[str]) -> nn.Module | None:
        found: Any = self.root
        for step in steps:
            found = found._modules.get(step) if found is not None else None
        return found

    def share(self) -> None:
        """One live layer also for the other names under which its tensors are registered."""
        live = [self.root.get_submodule(path) for path in self.layers.values()]
        for path, container in list(self.root.named_modules()):
            if type(container) is Exported and path and not container._modules:
                twin = next((m for m in live if _same_tensors(m, container)), None)
                if twin is not None:
                    set_submodule(self.root, path, twin)


def _plain(branch: nn.Module) -> nn.Module:
    """A branch of ``torch.cond`` and the like without export's tracer, which pickles can't name."""
    if not isinstance(branch, fx.GraphModule):
        return branch
    graph = fx.Graph()
    graph.output(graph.graph_copy(branch.graph, {}))
    return fx.GraphModule(branch, graph)


def _same_tensors(layer: nn.Module, container: nn.Module) -> bool:
    mine, theirs = dict(_tensors(layer)), dict(_tensors(container))
    return bool(mine) and mine.keys() == theirs.keys() and all(mine[k] is theirs[k] for k in mine)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _called_path(node: fx.Node) -> tuple[str, str]:
    """Path and class of the innermost module whose forward made the call, ``""`` if not known."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    # A module that is called again has "@1" at its path.
    return re.sub(r"@\d+", "", path), kind if isinstance(kind, str) else _name_of(kind)


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def attribute_at(module: nn.Module, path: str) -> Any:
    """What lies at a dotted path."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found
