"""What a learned result depends on, as digests, so that a checkpoint of anything else is refused.

Seen are tensors' bits, everything else in a batch, the modules and the code of their forwards, and
``forward`` by its code. Not seen is what that code calls or closes over, nor plain attributes that
a module's Python code reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import pickle
import re
from collections.abc import Iterable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

from ..batches import Forward
from ..values import as_integers, members
from .learn import Settings

Part = str | bytes | memoryview


@dataclasses.dataclass(frozen=True)
class Origin:
    """Options; digests of the model, of the batches and of how they are passed."""

    settings: Settings
    model: str
    batches: str
    forward: str

    @classmethod
    def of(
        cls, settings: Settings, model: nn.Module, batches: Iterable[Any], forward: Forward
    ) -> Origin:
        data = (part for batch in batches for part in _of_value(batch))
        return cls(settings, _digest(_of_model(model)), _digest(data), _digest(_of_code(forward)))


def _digest(parts: Iterable[Part]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()


def _of_model(model: nn.Module) -> Iterator[Part]:
    """State, modules and code: that of a graph is its stage's forward."""
    yield from _of_value(dict(sorted(model.state_dict().items())))
    yield _without_addresses(repr(model))
    for kind in dict.fromkeys(type(module) for module in model.modules()):
        yield from _of_code(kind.forward)


def _of_value(value: Any, depth: int = 8) -> Iterator[Part]:
    """A nested value: its types, names, and leaves."""
    yield type(value).__qualname__
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {tuple(value.shape)} {value.layout}"
        yield _bits(value)
    elif depth and (parts := members(value)):
        for name, part in parts:
            yield name
            yield from _of_value(part, depth - 1)
    else:
        yield _leaf(value)


def _bits(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().cpu()
    integers = as_integers(plain.dequantize() if plain.is_quantized else plain)
    data: memoryview = integers.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data


def _leaf(value: Any) -> Part:
    """What is no tensor and has no parts: by its content where it has one that can be stored."""
    if isinstance(value, (set, frozenset)):  # in an order that is another in each process
        return repr(sorted(map(repr, value)))
    try:
        return pickle.dumps(value, protocol=4)
    except Exception:
        return _without_addresses(repr(value))


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def _of_code(function: Any) -> Iterator[Part]:
    """A function's code; the name of what has none."""
    function = inspect.unwrap(getattr(function, "func", function))  # a partial's, a decorated one
    call = inspect.getattr_static(type(function), "__call__", None)
    code = getattr(function, "__code__", None) or getattr(call, "__code__", None)
    if isinstance(code, CodeType):
        yield from _of_bytecode(code)
    else:
        yield getattr(function, "__qualname__", type(function).__qualname__)


def _of_bytecode(code: CodeType) -> Iterator[Part]:
    """What it does, wherever it stands: no lines, no file."""
    yield code.co_code
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _of_bytecode(constant)
        else:
            yield from _of_value(constant)
