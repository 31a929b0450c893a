"""The contract of a pass: requires → run → ensures, and a report of what it did and left.

A pass changes one :class:`~apot_fx.passes.stage.StageModule` in place. Its invariants are checked
by :func:`run_passes` before and after, so a broken graph is found at the pass that broke it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import ClassVar

from .report import PassReport
from .stage import StageModule

#: Raises GrammarError (naming the node) where a stage breaks it.
Invariant = Callable[[StageModule], None]


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
        for holds in step.ensures:
            holds(stage)
        stage.apot.reports.append(report)
    stage.recompile()
    return stage
