"""What was learned so far, in a file, so that an interrupted run goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import StateError
from ..kernels import pack, unpack
from ..values import tensors_in
from .learn import Settings

_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Learned:
    """One unit's result: which elements go up, by weight; none of a unit that stays as it was."""

    before: float  # error with nearest levels
    after: float
    up: dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a result depends on: options, the model's tensors, the batches."""

    settings: Settings
    model: str
    batches: str

    @classmethod
    def of(cls, settings: Settings, model: nn.Module, batches: Iterable[Any]) -> Origin:
        state = sorted(model.state_dict().items())
        tensors = [(key, value) for key, value in state if isinstance(value, torch.Tensor)]
        data = ((str(n), t) for n, batch in enumerate(batches) for t in tensors_in(batch))
        return cls(settings, _digest(tensors), _digest(data))


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(plain.view(torch.uint8).numpy().data)
    return total.hexdigest()


class Checkpoint:
    """A file at ``path`` (None: nothing is kept) with the units that are learned."""

    def __init__(self, path: str | os.PathLike[str] | None, origin: Origin) -> None:
        self.path = None if path is None else Path(path)
        self.origin = origin
        self.units: dict[str, Learned] = {}
        if self.path is not None and self.path.exists():
            self.units = self._load(self.path)

    def _load(self, path: Path) -> dict[str, Learned]:
        """Raises StateError where the file is another's, or this run is another than its."""
        try:
            found = torch.load(path, weights_only=True)
            version, units = found["version"], found["units"]
        except Exception:
            raise StateError(f"{path} is no checkpoint of adaround; name another file") from None
        if version != _VERSION:
            raise StateError(f"{path} is of another version of apot_fx; delete it and start anew")
        mine, theirs = dataclasses.asdict(self.origin), found["origin"]
        for what, hint in _DIFFERS.items():
            if mine[what] != theirs[what]:
                was = f" ({theirs[what]})" if what == "settings" else ""
                raise StateError(f"{path} was made with {hint.format(was=was)}")
        return {name: _unpacked(unit) for name, unit in units.items()}

    def add(self, name: str, learned: Learned) -> None:
        """Keep a unit's result; the file is replaced as a whole."""
        self.units[name] = learned
        if self.path is None:
            return
        content = {
            "version": _VERSION,
            "origin": dataclasses.asdict(self.origin),
            "units": {name: _packed(unit) for name, unit in self.units.items()},
        }
        unfinished = self.path.with_name(self.path.name + ".tmp")
        torch.save(content, unfinished)
        unfinished.replace(self.path)


_DIFFERS = {
    "settings": "other options{was}; pass the same, or another file",
    "model": "other weights, alphas or statistics; prepare and calibrate alike, or name another "
    "file",
    "batches": "other batches; pass the same in the same order (no shuffling), or another file",
}


def _packed(unit: Learned) -> dict[str, Any]:
    up = {name: (pack(bits.byte(), 1), list(bits.shape)) for name, bits in unit.up.items()}
    return {"before": unit.before, "after": unit.after, "up": up}


def _unpacked(unit: Mapping[str, Any]) -> Learned:
    up = {name: unpack(bits, 1, tuple(shape)).bool() for name, (bits, shape) in unit["up"].items()}
    return Learned(unit["before"], unit["after"], up)
