"""What a pass tells about itself: what it changed, what it left and why."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Note:
    """One thing a pass changed or left: ``where`` is a node or layer name."""

    where: str
    what: str


@dataclasses.dataclass
class PassReport:
    """What one pass changed, and what it left as it was and why."""

    name: str
    changed: list[Note] = dataclasses.field(default_factory=list)
    left: list[Note] = dataclasses.field(default_factory=list)

    def change(self, where: object, what: str) -> None:
        self.changed.append(Note(str(where), what))

    def leave(self, where: object, why: str) -> None:
        self.left.append(Note(str(where), why))
