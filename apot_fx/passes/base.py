"""The contract of a pass: requires → run → ensures, and a report of what it did and left.

A pass changes one :class:`~apot_fx.passes.stage.StageModule` in place. Its invariants are checked
by :func:`run_passes` before and after, so a broken graph is found at the pass that broke it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .stage import StageModule

#: Raises GrammarError (naming the node) where a stage breaks it.
Invariant = Callable[[Any], None]


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


class Pass(abc.ABC):
    """One rewrite of a stage. Subclasses are small, frozen and know no other pass."""

    name: ClassVar[str]
    requires: ClassVar[tuple[Invariant, ...]] = ()
    ensures: ClassVar[tuple[Invariant, ...]] = ()

    @abc.abstractmethod
    def run(self, stage: StageModule, report: PassReport) -> None:
        """Rewrite ``stage.graph`` in place, telling ``report`` what changed and what was left."""


def run_passes(stage: StageModule, passes: Iterable[Pass]) -> StageModule:
    """Run passes in order on one stage, checking what each requires and ensures.

    Appends one :class:`PassReport` per pass to ``stage.apot.reports``. Raises GrammarError where
    an invariant does not hold.
    """
    for step in passes:
        for holds in step.requires:
            holds(stage)
        report = PassReport(step.name)
        step.run(stage, report)
        stage.graph.lint()
        stage.recompile()
        for holds in step.ensures:
            holds(stage)
        stage.apot.reports.append(report)
    return stage
