"""What one run of a model executes: calls, and multiply-adds of Linear and convolutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from torch.overrides import TorchFunctionMode, resolve_name

from apot_fx.nn import PreparedLayer, PreparedOp
from apot_fx.passes.opaque_call import OpaqueCall
from apot_fx.passes.stage import StageModule
from apot_fx.pipeline.floats import in_float
from apot_fx.pipeline.work import multiply_adds

_PRODUCTS = {
    functional.linear: (1, "weight"),
    functional.conv1d: (1, "weight"),
    functional.conv2d: (1, "weight"),
    functional.conv3d: (1, "weight"),
    torch.conv1d: (1, "weight"),
    torch.conv2d: (1, "weight"),
    torch.conv3d: (1, "weight"),
    torch.addmm: (2, "mat2"),
}
_TRANSPOSED = (
    functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d,
    torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d,
)  # fmt: skip


@dataclasses.dataclass
class Executed:
    """Calls in all, those outside of any graph, and multiply-adds by Linear and convolutions."""

    total: int = 0
    outside: int = 0
    macs: int = 0


class _Watch(TorchFunctionMode):
    """Counts torch functions, not those inside of leaf modules; reads of attributes don't count."""

    def __init__(self, found: Executed) -> None:
        super().__init__()
        self.found = found
        self.in_leaf = 0
        self.in_graph: list[bool] = [False]

    def count(self) -> None:
        self.found.total += 1
        self.found.outside += not self.in_graph[-1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.in_leaf and not _is_read(func):
            self.count()
        self.in_leaf += 1  # a function's own calls are parts of it
        try:
            result = func(*args, **kwargs)
        finally:
            self.in_leaf -= 1
        if isinstance(result, torch.Tensor):
            self.found.macs += _macs(func, args, kwargs, result)
        return result


def _is_read(func: Any) -> bool:
    name = resolve_name(func) or getattr(func, "__name__", "")
    return name.endswith(("__get__", "__set__")) or name.rsplit(".", 1)[-1] in (
        "size", "dim", "numel", "stride", "is_floating_point", "is_complex", "has_names",
        "__len__", "is_contiguous", "element_size",
    )  # fmt: skip


def _macs(func: Any, args: Any, kwargs: Any, result: torch.Tensor) -> int:
    if func in _TRANSPOSED:
        x, weight = args[0], kwargs.get("weight", args[1] if len(args) > 1 else None)
        return x.numel() * weight.numel() // max(1, weight.shape[0])
    if func not in _PRODUCTS:
        return 0
    place, key = _PRODUCTS[func]
    weight = args[place] if len(args) > place else kwargs[key]
    rows = weight.shape[1] if func is torch.addmm else weight.shape[0]
    return result.numel() * (weight.numel() // max(1, rows))


@contextmanager
def _module_hooks(model: nn.Module, watch: _Watch) -> Iterator[None]:
    """Leaf modules are one call; stages are graphs, what they leave in Python is not."""
    opaque = {
        id(stage.get_submodule(name))
        for stage in model.modules()
        if isinstance(stage, StageModule)
        for name in stage.apot.opaque
        if _has(stage, name)
    }
    with ExitStack() as stack:
        for module in model.modules():
            place: bool | None = None
            if isinstance(module, StageModule):
                place = True
            elif isinstance(module, OpaqueCall) or id(module) in opaque:
                place = False
            elif not _is_leaf(module):
                continue
            stack.callback(_hook(module, watch, place))
        yield


def _has(stage: StageModule, name: str) -> bool:
    try:
        stage.get_submodule(name)
    except AttributeError:
        return False
    return True


def _is_leaf(module: nn.Module) -> bool:
    """As ``torch.fx`` has it; our own layers too."""
    if isinstance(module, (PreparedOp,)):
        return True
    home = type(module).__module__
    return home.startswith("torch.nn.modules.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


def _hook(module: nn.Module, watch: _Watch, place: bool | None) -> Any:
    def enter(module: nn.Module, args: Any) -> None:
        if place is None:
            if not watch.in_leaf:
                watch.count()
            watch.in_leaf += 1
        else:
            watch.in_graph.append(place)

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        if place is None:
            watch.in_leaf -= 1
        else:
            watch.in_graph.pop()

    handles = (
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    )
    return lambda: [handle.remove() for handle in handles]


@torch.no_grad()
def run(model: nn.Module, inputs: Any) -> Any:
    """One eager run without gradients and torch's fused attention, from one seed."""
    return call(model, inputs)


def call(model: nn.Module, inputs: Any) -> Any:
    """The call itself."""
    torch.backends.mha.set_fastpath_enabled(False)
    torch.manual_seed(1)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def executed(model: nn.Module, inputs: Any) -> Executed:
    """What one float run executes; of a prepared model, with every quantizer off."""
    found = Executed()
    watch = _Watch(found)
    with torch.no_grad(), in_float(model), _module_hooks(model, watch), watch:
        call(model, inputs)
    return found


def quantized_share(prepared: nn.Module, inputs: Any, before: Executed) -> float:
    """Multiply-adds of quantized layers over those of the float model's Linear and Conv calls."""
    done = 0

    def count(module: nn.Module, args: Any, result: Any) -> None:
        nonlocal done
        if isinstance(module, PreparedLayer) and not module.read_at:
            done += multiply_adds(module, args, result)

    handles = [
        module.register_forward_hook(count)
        for module in prepared.modules()
        if isinstance(module, PreparedLayer)
    ]
    try:
        run(prepared, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return min(1.0, done / before.macs) if before.macs else 1.0


def ignores_input(model: nn.Module, inputs: Any) -> bool:
    """Whether another input gives the same output (as some models do at random weights)."""
    from apot_fx.values import same_bits

    def other(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: other(part) for key, part in value.items()}
        if value.is_floating_point():
            return torch.randn_like(value)
        changed = value.clone()
        changed[:, 0] = (changed[:, 0] + 1).clamp(0, 98) if value.max() > 1 else changed[:, 0]
        return changed

    return same_bits(run(model, inputs), run(model, other(inputs)))
