"""Multiply-adds of one run: which part of them quantized layers do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..nn import PreparedLayer, PreparedOp, PreparedRecurrent, TransposedProduct
from ..passes.stage import Work

_PRODUCTS = ("bmm", "baddbmm", "attention")


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


#: Torch's counter knows only the attention of GPUs.
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_attention_math: _attention_flops,
}


@contextmanager
def counting_work(prepared: nn.Module) -> Iterator[Work]:
    """While open, count multiply-adds; the result is filled when it closes.

    Torch's own counter sees float ops; quantized layers are counted by their shapes, and what torch
    counts inside of them is put back.
    """
    work, counter = Work(), FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    counter.mod_tracker = _Everywhere()  # type: ignore[assignment]
    handles = []
    for module in prepared.modules():
        if isinstance(module, PreparedOp):
            inside = _Inside(work, counter)
            handles.append(module.register_forward_pre_hook(inside.enter))
            handles.append(module.register_forward_hook(inside.leave, with_kwargs=True))
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


class _Everywhere:
    """In place of torch's tracker of modules: its hooks trip over views of parameters, which need
    gradients but have no gradient function under ``no_grad``."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *problem: object) -> None: ...


class _Inside:
    """The hooks of one quantized layer."""

    def __init__(self, work: Work, counter: FlopCounterMode) -> None:
        self.work, self.counter = work, counter
        self.before: list[dict[Any, int]] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        self.before.append(dict(self.counter.flop_counts["Global"]))

    def leave(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        counts = self.counter.flop_counts["Global"]
        counts.clear()
        counts.update(self.before.pop())
        self.work.quantized += multiply_adds(module, (*args, *kwargs.values()), result)


def multiply_adds(layer: nn.Module, args: Any, result: Any) -> int:
    """Of one call of a prepared layer, by shapes; 0 for operators without a weight."""
    if isinstance(layer, PreparedRecurrent):
        rows = getattr(args[0], "data", args[0])
        steps = rows.numel() // max(1, rows.shape[-1])
        return steps * sum(weight.numel() for weight in layer.weights.values())
    if isinstance(layer, PreparedLayer) and isinstance(result, torch.Tensor):
        count = layer.weight_shape.numel()
        if isinstance(layer.product, TransposedProduct):  # every input meets the kernel once
            return int(args[0].numel()) * (count // max(1, layer.weight_shape[0]))
        return result.numel() * (count // max(1, layer.channels))
    return 0
