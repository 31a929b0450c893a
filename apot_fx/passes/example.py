"""Example inputs: one call of a model's forward."""

from __future__ import annotations

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
    """Positional and keyword arguments of one call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

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
        """The same with copies of its tensors: a forward may write into its inputs."""
        args, kwargs = pytree.tree_map(_copied, (self.args, self.kwargs))
        return Call(args, kwargs)

    def grown(self) -> Call:
        """The same with twice the batch: tensors of the first one's length, each doubled."""
        tensors = [
            leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if _has_batch(leaf)
        ]
        size = len(tensors[0]) if tensors else 0

        def grow(leaf: Any) -> Any:
            return torch.cat([leaf, leaf]) if _has_batch(leaf) and len(leaf) == size else leaf

        args, kwargs = pytree.tree_map(grow, (self.args, self.kwargs))
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
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
