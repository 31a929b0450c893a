"""Residual adds and average pools on indices, where the config asks for it (``residual=8``)."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch
from torch import fx, nn

from ..config import ActivationSpec, QConfigMapping
from ..graph import argument, called_module, called_name, free_name, set_submodule, value_kind
from ..nn import Pool, PreparedAdd, PreparedOp, PreparedPool
from .annotate import PLAN, LayerPlan
from .base import Pass
from .functionalize import is_functional
from .index_ops import is_torch_call
from .report import PassReport
from .stage import StageModule, set_info


@dataclasses.dataclass(frozen=True)
class QuantizeResiduals(Pass):
    """Turn adds of two values, and average pools over spatial axes, into operators on a grid.

    Both branches of an add get one α. Does nothing unless the mapping's global choice says
    ``ActivationSpec(residual=…)``.
    """

    mapping: QConfigMapping

    name = "residual"
    requires = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        chosen = self.mapping.global_config
        bits = chosen.activation.residual if chosen and chosen.activation else None
        if bits is None:
            return
        spec = ActivationSpec(bits, kind="uniform")
        for node in list(stage.graph.nodes):
            if node.meta.get("pinned") or node.meta.get("keep"):
                continue
            if is_add(node):
                if _feeds_softmax(stage, node):
                    report.leave(node, "a softmax reads it: one operand is a mask, maybe of -inf")
                    continue
                both = (node.args[0], node.args[1])
                name = free_name(stage, "apot_add")
                put_operator(stage, node, name, PreparedAdd(), both, LayerPlan(None, spec))
                report.change(node, f"add on {spec.describe()}")
                continue
            pool = pool_of(stage, node)
            if pool is not None:
                source = argument(node, 0, "input")
                name, plan = free_name(stage, "apot_pool"), LayerPlan(None, spec)
                put_operator(stage, node, name, PreparedPool(pool), source, plan)
                report.change(node, f"average pool on {spec.describe()}")


def put_operator(
    stage: StageModule, node: fx.Node, name: str, op: PreparedOp, source: Any, plan: LayerPlan
) -> None:
    """Let a node call an operator on ``source``, a value or a tuple of them."""
    before = called_module(stage, node)
    set_submodule(stage, name, op.train((before or stage).training))
    node.op, node.target, node.args, node.kwargs = "call_module", name, (source,), {}
    node.meta[PLAN] = plan
    set_info(node, layer=name)


def is_add(node: fx.Node) -> bool:
    """``a + b`` of two tensors, one of which at least is no parameter or buffer itself."""
    if node.target not in (operator.add, torch.add, "add") or node.kwargs or len(node.args) != 2:
        return False
    operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
    tensors = [arg for arg in operands if value_kind(arg) == "tensor"]
    return len(tensors) == 2 and any(arg.op != "get_attr" for arg in tensors)


def _feeds_softmax(stage: nn.Module, node: fx.Node) -> bool:
    modules = [called_module(stage, user) for user in node.users]
    return any(isinstance(module, (nn.Softmax, nn.LogSoftmax)) for module in modules) or any(
        called_name(user) in ("softmax", "log_softmax", "_softmax") for user in node.users
    )


def pool_of(stage: nn.Module, node: fx.Node) -> Pool | None:
    """The geometry of an average pool or spatial mean; None for anything else."""
    module = called_module(stage, node)
    if module is not None:
        return _module_pool(module)
    name = called_name(node)
    if not isinstance(argument(node, 0, "input"), fx.Node):
        return None
    if name in ("avg_pool1d", "avg_pool2d"):
        return _window_pool(node, rank=int(name[-2]))
    if not is_torch_call(node, name):
        return None
    if name in ("adaptive_avg_pool1d", "adaptive_avg_pool2d"):
        return _adaptive(argument(node, 1, "output_size"), rank=int(name[-2]))
    return _mean(node) if name == "mean" else None


def _module_pool(module: nn.Module) -> Pool | None:
    kind = type(module)
    if kind in (nn.AvgPool1d, nn.AvgPool2d):
        rank = 1 if kind is nn.AvgPool1d else 2
        return _window(
            rank,
            module.kernel_size,
            module.stride,
            module.padding,
            bool(module.ceil_mode),
            bool(module.count_include_pad),
            getattr(module, "divisor_override", None),
        )
    if kind in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d):
        return _adaptive(module.output_size, rank=1 if kind is nn.AdaptiveAvgPool1d else 2)
    return None


def _window_pool(node: fx.Node, rank: int) -> Pool | None:
    names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
    defaults = (None, None, 0, False, True)
    kernel, stride, padding, ceil_mode, count_include_pad = (
        argument(node, place + 1, name, default)
        for place, (name, default) in enumerate(zip(names, defaults, strict=True))
    )
    divisor = argument(node, 6, "divisor_override") if rank == 2 else None
    return _window(rank, kernel, stride, padding, ceil_mode, count_include_pad, divisor)


def _window(
    rank: int,
    kernel: Any,
    stride: Any,
    padding: Any,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> Pool | None:
    kernels, strides = _sizes(kernel, rank), _sizes(stride or kernel, rank)
    paddings = _sizes(padding, rank)
    if kernels is None or strides is None or paddings is None:
        return None
    return Pool(
        "window",
        rank,
        kernel=kernels,
        stride=strides,
        padding=paddings,
        ceil_mode=ceil_mode,
        count_include_pad=count_include_pad,
        divisor=divisor,
    )


def _sizes(value: Any, rank: int) -> tuple[int, ...] | None:
    values = (value,) * rank if isinstance(value, int) else tuple(value)
    values = values * rank if len(values) == 1 else values
    return values if all(isinstance(size, int) for size in values) else None


def _adaptive(output: Any, rank: int) -> Pool | None:
    sizes = (output,) * rank if isinstance(output, int) or output is None else tuple(output)
    if not all(size is None or isinstance(size, int) for size in sizes):
        return None
    return Pool("adaptive", rank, output=sizes)


def _mean(node: fx.Node) -> Pool | None:
    """A mean over exactly the two spatial axes of a 4-d tensor, in any spelling."""
    axes = argument(node, 1, "dim")
    if axes is None:
        axes = node.kwargs.get("axis")
    keepdim = argument(node, 2, "keepdim", False)
    if not isinstance(axes, (tuple, list)) or node.kwargs.get("dtype") is not None:
        return None
    spatial = set(axes) in ({2, 3}, {-1, -2}, {2, -1}, {-2, 3}) and len(axes) == 2
    return Pool("mean", 2, keepdim=bool(keepdim)) if spatial else None
