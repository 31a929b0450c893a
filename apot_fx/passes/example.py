"""Example inputs: one call of a model's forward."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import TraceError


@dataclasses.dataclass(frozen=True)
class Call:
    """Positional and keyword arguments of one call, and what it gave, where that is known."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any = None

    @classmethod
    def of(cls, inputs: Any) -> Call:
        """Of example_inputs: tensor → ``(x,)``, dict → keywords, tuple or list → positions."""
        if isinstance(inputs, Call):
            return inputs
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs))
        if isinstance(inputs, (tuple, list)):
            return cls(tuple(inputs), {})
        return cls((inputs,), {})

    def copied(self) -> Call:
        """The same with copies of tensors and objects: a forward may write into its inputs."""
        args, kwargs = pytree.tree_map(_once_each(_copied), (self.args, self.kwargs))
        return Call(args, kwargs)

    def resized(self) -> list[Call]:
        """The same with other sizes, the most telling first.

        Half the batch (of one: twice) and half of axis 1, which may be time; half the batch and of
        the last axes, which may be space; half the batch.
        """
        return [self._resized(axes) for axes in (_batch_and_time, _batch_and_space, _batch)]

    def _resized(self, axes: Callable[[torch.Tensor], tuple[int, ...]]) -> Call:
        """With other lengths of axes, where they are those of the first tensor that has them."""
        lengths: dict[int, int] = {}

        def resize(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
                return leaf
            for axis in axes(leaf):
                size = leaf.shape[axis]
                if lengths.setdefault(axis, size) == size:
                    leaf = _half(leaf, axis)
            return leaf

        args, kwargs = pytree.tree_map(_once_each(resize), (self.args, self.kwargs))
        return Call(args, kwargs)

    def bound(self, model: nn.Module) -> inspect.BoundArguments:
        """By the names of ``model.forward``; raises TraceError where they don't fit it."""
        signature = inspect.signature(model.forward)
        try:
            return signature.bind(*self.args, **self.kwargs)
        except TypeError as problem:
            raise TraceError(
                f"example_inputs don't fit {type(model).__name__}.forward{signature}: {problem}"
            ) from None


def _once_each(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function of leaves by which what was one object stays one."""
    memo: dict[int, Any] = {}

    def once(leaf: Any) -> Any:
        if id(leaf) not in memo:
            memo[id(leaf)] = function(leaf)
        return memo[id(leaf)]

    return once


def _batch(tensor: torch.Tensor) -> tuple[int, ...]:
    return (0,) if tensor.dim() else ()


def _batch_and_time(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(range(min(2, tensor.dim())))


def _batch_and_space(tensor: torch.Tensor) -> tuple[int, ...]:
    return (*_batch(tensor), *range(2, tensor.dim()))


def _half(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    size = tensor.shape[axis]
    return tensor.narrow(axis, 0, size // 2) if size > 1 else torch.cat([tensor, tensor], axis)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, (bool, int, float, str, nn.Module)):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:
        return value
