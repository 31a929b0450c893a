"""What was learned so far, in a file, so that an interrupted run goes on where it was."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import StateError
from ..kernels import pack, unpack
from .origin import Origin
from .units import Unit
from .weights import Weight

_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Learned:
    """One unit's result: which elements go up, by weight; none of a unit that stays as it was."""

    before: float  # error with nearest levels
    after: float
    up: dict[str, torch.Tensor]


def check_path(path: object) -> Path | None:
    """Where a checkpoint is to be; raises StateError where it can't be written, before any work."""
    if path is None:
        return None
    if not isinstance(path, (str, os.PathLike)):
        raise StateError(f"adaround: checkpoint is {path!r}; the path of a file is wanted")
    file = Path(path)
    if file.is_dir():
        raise StateError(f"adaround: checkpoint {file} is a directory; name a file in it")
    try:
        _unfinished(file).touch()
        _unfinished(file).unlink()
    except OSError as problem:
        raise StateError(
            f"adaround: checkpoint {path} can't be written ({problem.strerror}); name a file in a "
            "directory that exists and takes files"
        ) from None
    return file


def _unfinished(path: Path) -> Path:
    """Where a checkpoint is written before it takes the place of the last one."""
    return path.with_name(path.name + ".tmp")


class Checkpoint:
    """The units that are learned, in a file at ``path``; in memory alone without one.

    Raises StateError where the file is another's, or this run is another than its.
    """

    def __init__(self, path: Path | None, origin: Origin | None) -> None:
        self.path, self.origin = path, origin
        self.units: dict[str, Learned] = {}
        if path is not None and origin is not None and path.exists():
            theirs, self.units = _read(path)
            mine = dataclasses.asdict(origin)
            for what, hint in _DIFFERS.items():
                if mine[what] != theirs[what]:
                    was = f" ({theirs[what]})" if what == "settings" else ""
                    raise StateError(f"{path} was made with {hint.format(was=was)}")

    def check(self, units: Iterable[Unit], weights: Mapping[str, Weight]) -> None:
        """Refuse a file that was changed: roundings of no unit, or of other shapes."""
        shapes = {unit.name: {w: weights[w].rows.shape for w in unit.weights} for unit in units}
        for name, learned in self.units.items():
            found = {weight: up.shape for weight, up in learned.up.items()}
            if name not in shapes or (found and found != shapes[name]):
                raise StateError(
                    f"{self.path} is no checkpoint of adaround for this model: {name} has other "
                    "weights; name another file"
                )

    def add(self, name: str, learned: Learned) -> None:
        """Keep a unit's result; the file is replaced as a whole."""
        self.units[name] = learned
        if self.path is None or self.origin is None:
            return
        content = {
            "version": _VERSION,
            "origin": dataclasses.asdict(self.origin),
            "units": {name: _packed(unit) for name, unit in self.units.items()},
        }
        torch.save(content, _unfinished(self.path))
        _unfinished(self.path).replace(self.path)


_DIFFERS = {
    "settings": "other options{was}; pass the same, or another file",
    "model": "another model, or other weights, alphas or statistics; prepare and calibrate alike, "
    "or name another file",
    "batches": "other batches; pass the same in the same order (no shuffling), or another file",
    "forward": "another forward; pass the same, or another file",
}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Learned]]:
    """A file's origin and units."""
    try:
        found = torch.load(path, weights_only=True)
        if found["version"] == _VERSION:
            units = {name: _unpacked(unit) for name, unit in found["units"].items()}
            return {what: found["origin"][what] for what in _DIFFERS}, units
    except Exception:
        raise StateError(f"{path} is no checkpoint of adaround; name another file") from None
    raise StateError(f"{path} is of another version of apot_fx; delete it and start anew")


def _packed(unit: Learned) -> dict[str, Any]:
    up = {name: (pack(bits.byte(), 1), list(bits.shape)) for name, bits in unit.up.items()}
    return {"before": unit.before, "after": unit.after, "up": up}


def _unpacked(unit: Mapping[str, Any]) -> Learned:
    up = {name: unpack(bits, 1, tuple(shape)).bool() for name, (bits, shape) in unit["up"].items()}
    return Learned(float(unit["before"]), float(unit["after"]), up)
