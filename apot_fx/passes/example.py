"""Example inputs: one call of a model's forward."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Mapping
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
        args, kwargs = pytree.tree_map(_copied, (self.args, self.kwargs))
        return Call(args, kwargs)

    def resized(self) -> Call:
        """The same with another batch size, half or twice: of tensors as long as the first one."""
        tensors = [
            leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if _has_batch(leaf)
        ]
        size = len(tensors[0]) if tensors else 0

        def resize(leaf: Any) -> Any:
            if not _has_batch(leaf) or len(leaf) != size:
                return leaf
            return leaf[: size // 2] if size > 1 else torch.cat([leaf, leaf])

        args, kwargs = pytree.tree_map(resize, (self.args, self.kwargs))
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


def _has_batch(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, (bool, int, float, str, nn.Module)):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:
        return value
