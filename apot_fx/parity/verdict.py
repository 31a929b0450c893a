"""The result of a parity check."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ..errors import ParityError
from ..table import Table

EXACT, DIFFERS, INCONCLUSIVE = "bit-exact", "differs", "inconclusive"


@dataclasses.dataclass
class Finding:
    """One thing compared: a stored tensor, the graph, or the values of one node over all batches.

    ``values`` is how many elements were compared, ``differing`` how many are not the same bits,
    ``ulp`` and ``steps`` by how much at most: units in the last place of float32, and index steps.
    """

    where: str
    what: str
    layer: str = ""
    values: int = 0
    differing: int = 0
    ulp: int = 0
    steps: int = 0
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.differing and not self.problem

    def describe(self) -> str:
        """One line: where, in which layer, how many elements and by how much."""
        layer = f" (layer {self.layer})" if self.layer and self.layer != self.where else ""
        if self.problem:
            return f"{self.where}{layer}: {self.what}: {self.problem}"
        text = (
            f"{self.where}{layer}: {self.what}: {self.differing} of {self.values} elements differ"
        )
        if self.ulp:
            text += f", by up to {self.ulp} ULP"
        if self.steps:
            text += f", {self.steps} index steps"
        return text


@dataclasses.dataclass
class Verdict:
    """What ``check_parity`` gives.

    Attributes:
        stored: findings on stored tensors, attributes and the graph.
        nodes: one finding per node whose values both stages computed, in graph order.
        unstable: nodes of prepared that differ from themselves in two runs.
        uncovered: quantized layers of which no value was compared.
        train_form: per layer, the largest distance of the ordinary train-form fake-quant from the
            integer form, relative to the layer's largest ``|y|`` or ``|acc · s|`` (information).
        nan_inputs: NaN values seen in float inputs of quantizers (information).
        notes: further information.
    """

    stored: list[Finding] = dataclasses.field(default_factory=list)
    nodes: list[Finding] = dataclasses.field(default_factory=list)
    unstable: list[str] = dataclasses.field(default_factory=list)
    uncovered: list[str] = dataclasses.field(default_factory=list)
    train_form: dict[str, float] = dataclasses.field(default_factory=dict)
    nan_inputs: int = 0

    @property
    def failures(self) -> list[Finding]:
        """Everything that differs, stored things first, then nodes in graph order."""
        missing = [
            Finding(layer, "values", layer, problem="no value of this layer was compared")
            for layer in self.uncovered
        ]
        return [finding for finding in [*self.stored, *self.nodes, *missing] if not finding.ok]

    @property
    def status(self) -> str:
        """``"bit-exact"``, ``"differs"`` or ``"inconclusive"``."""
        if self.failures:
            return DIFFERS
        return INCONCLUSIVE if self.unstable or not self.nodes else EXACT

    @property
    def ok(self) -> bool:
        return self.status == EXACT

    @property
    def values(self) -> int:
        """How many values of both stages were compared."""
        return sum(finding.values for finding in self.nodes)

    def raise_if_failed(self) -> Verdict:
        """Return self where ``ok``; raises ParityError with the first failure otherwise."""
        if not self.ok:
            raise ParityError(str(self))
        return self

    def table(self) -> Table:
        """One row per finding."""
        rows = [
            {
                "where": finding.where,
                "layer": finding.layer,
                "what": finding.what,
                "values": finding.values,
                "differing": finding.differing,
                "max ULP": finding.ulp,
                "index steps": finding.steps,
                "problem": finding.problem,
            }
            for finding in [*self.stored, *self.nodes]
        ]
        return Table(_COLUMNS, rows, title="parity", notes=[str(self)])

    def to_json(self) -> str:
        """Everything, as one JSON object."""
        content: dict[str, Any] = {
            "status": self.status,
            "ok": self.ok,
            "values": self.values,
            **dataclasses.asdict(self),
        }
        return json.dumps(content, indent=1)

    def __str__(self) -> str:
        lines = [self._headline()]
        if self.train_form:
            layer, worst = max(self.train_form.items(), key=lambda item: item[1])
            lines.append(
                "train form against integer form: at most "
                f"{worst:.1e} · max(|y|, |acc·s|) ({layer})"
            )
        if self.nan_inputs:
            lines.append(f"{self.nan_inputs} NaN inputs to quantizers became the zero level")
        return "\n".join(lines)

    def _headline(self) -> str:
        if self.failures:
            rest = len(self.failures) - 1
            more = f" (and {rest} more)" if rest else ""
            return f"differs: {self.failures[0].describe()}{more}"
        if self.unstable:
            return f"inconclusive: non-deterministic in prepared itself: {', '.join(self.unstable)}"
        if not self.nodes:
            return "inconclusive: nothing was compared"
        return f"bit-exact over {self.values} values in {len(self.nodes)} nodes"


_COLUMNS = (
    "where",
    "layer",
    "what",
    "values",
    "differing",
    "max ULP",
    "index steps",
    "problem",
)
