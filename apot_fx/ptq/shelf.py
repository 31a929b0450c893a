"""A shelf for tensors: in memory up to a limit, in a file beyond it.

What comes back is the same either way, bit for bit and contiguous, so that nothing that is computed
from it depends on the limit.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from contextlib import AbstractContextManager
from typing import Any, BinaryIO

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..values import tensors_in


@dataclasses.dataclass(frozen=True)
class Held:
    """One tensor: in memory, or in a file from ``offset`` on."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    memory: torch.Tensor | None
    file: BinaryIO | None = None
    offset: int = 0

    def take(self, rows: torch.Tensor | None) -> torch.Tensor:
        """A copy, of some rows alone if so wished, where the tensor came from."""
        if self.memory is not None:
            found = self.memory.clone() if rows is None else self.memory.index_select(0, rows)
        elif rows is None:
            found = self._read(self.offset, self.shape)
        else:
            row = self.shape[1:]
            size = row.numel() * self.dtype.itemsize
            parts = [self._read(self.offset + size * place, row) for place in rows.tolist()]
            found = torch.stack(parts)
        return found.to(self.device)

    def _read(self, offset: int, shape: torch.Size) -> torch.Tensor:
        assert self.file is not None
        out = torch.empty(shape, dtype=self.dtype)
        if out.numel():
            self.file.seek(offset)
            self.file.readinto(_bytes_of(out))  # type: ignore[attr-defined]
        return out


@dataclasses.dataclass(frozen=True, eq=False)
class Object:
    """An object of a user's class: a copy with places in it, and the tensors that belong there."""

    shell: Any
    tensors: tuple[Held, ...]

    def take(self) -> Any:
        """The object again, with copies of its tensors."""
        return copy.deepcopy(self.shell, {id(one): one.take(None) for one in self.tensors})


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A nested value on a shelf; numbers, modules and the like are kept as they are.

    Every leaf is a :class:`Held` tensor, an :class:`Object` with some, or the value itself.
    """

    leaves: tuple[Any, ...]
    structure: Any

    @property
    def tensors(self) -> list[Held]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Held)]

    def take(self, rows: torch.Tensor | None = None) -> Any:
        """The value again; ``rows``: these rows of every tensor."""
        return self.rebuild(_taken(leaf, rows) for leaf in self.leaves)

    def rebuild(self, leaves: Any) -> Any:
        """A value of the same structure."""
        return pytree.tree_unflatten(list(leaves), self.structure)


def _taken(leaf: Any, rows: torch.Tensor | None) -> Any:
    if isinstance(leaf, Held):
        return leaf.take(rows)
    return leaf.take() if isinstance(leaf, Object) else _copy(leaf)


class Shelf(AbstractContextManager["Shelf"]):
    """Keeps copies of nested values; tensors past ``limit`` bytes lie in one temporary file.

    The file has no name and is gone with the process, however that ends. It lies where
    ``tempfile`` puts files (``TMPDIR``).
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0  # bytes in memory
        self.spilled = 0  # bytes in the file
        self._file: Any = None

    def put(self, value: Any) -> Kept:
        """Keep a copy."""
        leaves, structure = pytree.tree_flatten(value)
        return Kept(tuple(self._put_leaf(leaf) for leaf in leaves), structure)

    def _put_leaf(self, leaf: Any) -> Any:
        if _is_plain(leaf):
            return self._put(leaf)
        if isinstance(leaf, (*_SHARED, torch.Tensor)):
            return _copy(leaf)
        tensors = {id(tensor): tensor for tensor in tensors_in(leaf) if _is_plain(tensor)}
        if not tensors:
            return _copy(leaf)
        held = {key: self._put(tensor) for key, tensor in tensors.items()}
        try:  # deepcopy takes what its memo has for an object: the place of a tensor for the tensor
            return Object(copy.deepcopy(leaf, dict(held)), tuple(held.values()))
        except Exception:  # its own code does not take such places
            return _copy(leaf)

    def _put(self, tensor: torch.Tensor) -> Held:
        size = tensor.numel() * tensor.element_size()
        facts = (tensor.shape, tensor.dtype, tensor.device)
        plain = tensor.detach().to("cpu").contiguous()
        if self.held + size <= self.limit:
            self.held += size
            return Held(*facts, plain.clone())
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        offset = self.spilled
        self._file.seek(offset)
        if size:
            self._file.write(_bytes_of(plain))
        self.spilled += size
        return Held(*facts, None, self._file, offset)

    def __exit__(self, *problem: object) -> None:
        if self._file is not None:
            self._file.close()


#: What no call changes, or what is meant itself (a fake-quant that is passed along).
_SHARED = (int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, nn.Module)


def _copy(leaf: Any) -> Any:
    """An object of its own (a cache that layers add to, say), where it can be copied."""
    if isinstance(leaf, _SHARED):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except (TypeError, RuntimeError):
        return leaf


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_quantized
