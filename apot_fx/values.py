"""What forwards take and give: nested values, the tensors in them, and their bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def members(value: Any) -> list[tuple[str, Any]]:
    """Named parts of a tuple, list, mapping or object of a user's class; ``[]`` of anything else.

    >>> members({"a": (1, 2)})
    [('a', (1, 2))]
    """
    if isinstance(value, Mapping):
        return [(str(key), part) for key, part in value.items()]
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return [(str(place), part) for place, part in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    state = getattr(value, "__dict__", None)
    if type(state) is dict and not isinstance(value, (torch.Tensor, torch.nn.Module, type)):
        return list(state.items())
    return []


def tensor_pairs(
    mine: Any, theirs: Any, depth: int = 8
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tensors at the same place of two nested values."""
    if isinstance(mine, torch.Tensor) or isinstance(theirs, torch.Tensor):
        if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
            yield mine, theirs
    elif depth:
        other = dict(members(theirs))
        for name, part in members(mine):
            if name in other:
                yield from tensor_pairs(part, other[name], depth - 1)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor of a nested value, in order."""
    return [tensor for tensor, _ in tensor_pairs(value, value)]


def as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits as integers (integers and bools as they are); a sparse one's, spread out."""
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def unequal(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one shape and dtype differ in bits; any two NaNs are equal."""
    if first.layout is not torch.strided:
        first, second = first.to_dense(), second.to_dense()
    if first.is_complex():
        first, second = torch.view_as_real(first), torch.view_as_real(second)
    differ = as_integers(first) != as_integers(second)
    if first.is_floating_point():
        differ = differ & ~(first.isnan() & second.isnan())
    return differ


def same_bits(mine: Any, theirs: Any) -> bool:
    """Whether two nested values hold the same tensors, bit for bit."""
    pairs = list(tensor_pairs(mine, theirs))
    return len(pairs) == len(tensors_in(mine)) == len(tensors_in(theirs)) and all(
        first.shape == second.shape
        and first.dtype == second.dtype
        and not bool(unequal(first, second).any())
        for first, second in pairs
    )
