"""Multiply-adds of one run: which part of them quantized layers do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from ..nn import PreparedLayer, PreparedOp, PreparedRecurrent
from ..passes.stage import Work

_PRODUCTS = ("bmm", "baddbmm", "attention")


@contextmanager
def counting_work(prepared: nn.Module) -> Iterator[Work]:
    """While open, count multiply-adds; the result is filled when it closes.

    Torch's own counter sees float ops; quantized layers are counted by their shapes, and what torch
    counts inside of them is put back.
    """
    work, counter = Work(), FlopCounterMode(display=False)
    counter.mod_tracker = _NoTracker()
    handles = []
    for module in prepared.modules():
        if isinstance(module, PreparedOp):
            inside = _Inside(work, counter)
            handles.append(module.register_forward_pre_hook(inside.enter))
            handles.append(module.register_forward_hook(inside.leave))
    try:
        with counter:
            yield work
    finally:
        for handle in handles:
            handle.remove()
    for operation, flops in counter.flop_counts["Global"].items():
        if any(part in str(operation) for part in _PRODUCTS):
            work.products += flops // 2
        else:
            work.float_layers += flops // 2


class _NoTracker(ModuleTracker):
    """Everything counts as "Global".

    Torch's own asks tensors that layers are called with for their gradient function, and fails on a
    part of a packed parameter: without gradients it has none, but requires one.
    """

    def __enter__(self) -> _NoTracker:
        return self

    def __exit__(self, *args: object) -> None:
        pass


class _Inside:
    """The hooks of one quantized layer."""

    def __init__(self, work: Work, counter: FlopCounterMode) -> None:
        self.work, self.counter = work, counter
        self.before: list[dict[Any, int]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self.before.append(dict(self.counter.flop_counts["Global"]))

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        counts = self.counter.flop_counts["Global"]
        counts.clear()
        counts.update(self.before.pop())
        self.work.quantized += multiply_adds(module, args, result)


def multiply_adds(layer: nn.Module, args: Any, result: Any) -> int:
    """Of one call of a prepared layer, by shapes; 0 for operators without a weight."""
    if isinstance(layer, PreparedRecurrent):
        rows = getattr(args[0], "data", args[0])
        steps = rows.numel() // max(1, rows.shape[-1])
        return steps * sum(weight.numel() for weight in layer.weights.values())
    if isinstance(layer, PreparedLayer) and isinstance(result, torch.Tensor):
        shape = layer.weight_shape
        return result.numel() * (shape.numel() // max(1, shape[0]))
    return 0
