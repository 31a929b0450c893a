"""Coverage: which models prepare, run, convert and agree, and how much of each is quantized.

    python benchmarks/coverage.py [--family timm] [--only resnet] [--json coverage.json]
                                  [--markdown docs/coverage.md]

With ``--json``, rows of models that are not run now are kept.

Columns: leaves: parts left in Python; calls: share of the executed calls (torch functions and leaf
nn modules of one eager float run) that stand in a graph; macs: share of the multiply-adds of Linear
and convolutions that quantized layers do, both counted in a float run; edges: layer-to-layer edges
carried as indices where residual adds, pools and products are on indices too; bits: differing bits
of converted against prepared. Models whose output ignores their input say so and do not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from counting import executed, ignores_input, quantized_share
from torch import nn
from zoo import FAMILIES, Entry

import apot_fx
from apot_fx.passes.edges import index_edges
from apot_fx.passes.tree import stage_info, stages
from apot_fx.table import Table

COLUMNS = ("model", "leaves", "calls", "macs", "edges", "bits", "prepare s", "all s", "problem")

#: Residual adds, average pools and products of activations on 8-bit indices, for the edges.
_INTEGER = apot_fx.QConfigMapping.from_preset("w4a4").set_global(
    apot_fx.QConfig(apot_fx.WeightSpec(4), apot_fx.ActivationSpec(4, residual=8, products=8))
)


def measure(entry: Entry) -> dict[str, Any] | None:
    """One row; None for a model that does not run in float."""
    name, build, batch = entry
    torch.manual_seed(0)
    try:
        model, inputs = build().eval(), batch()
        before = executed(model, inputs)
    except Exception as problem:
        print(f"{name}: does not run in float: {problem}", file=sys.stderr)
        return None
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {"model": name}
    if ignores_input(model, inputs):
        row["problem"] = "output ignores its input"
    start = time.perf_counter()
    try:
        prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=inputs)
        row["prepare s"] = round(time.perf_counter() - start, 1)
        apot_fx.calibrate(prepared, [inputs], progress=False)
        verdict = apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [inputs])
        row["all s"] = round(time.perf_counter() - start, 1)
        known = stage_info(prepared)
        assert known is not None
        row["leaves"] = len(known.opaque)
        row["bits"] = sum(finding.differing for finding in verdict.nodes)
        row["calls"] = round(1 - executed(prepared, inputs).outside / max(1, before.total), 4)
        row["macs"] = round(quantized_share(prepared, inputs, before), 4)
        row["edges"] = edges(model, inputs)
        if not verdict.ok:
            row["problem"] = str(verdict).splitlines()[0]
    except Exception as problem:
        row["problem"] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:160]}"
    return row


def edges(model: nn.Module, inputs: Any) -> str:
    """``carried/all`` where adds and pools are on indices too."""
    prepared = apot_fx.prepare_apot(model, _INTEGER, example_inputs=inputs)
    found = [index_edges(stage) for stage in stages(prepared).values()]
    carried, total = (sum(column) for column in zip((0, 0), *found, strict=True))
    return f"{carried}/{total}"


def summarise(rows: list[dict[str, Any]]) -> list[str]:
    """The figures, over the models that count."""
    counted = [row for row in rows if "ignores" not in row["problem"]]
    done = [row for row in counted if row["bits"] != ""]
    exact = [row for row in done if row["bits"] == 0 and not row["problem"]]
    with_edges = [row for row in done if row["edges"]]
    carried, total = (
        sum(int(row["edges"].split("/")[place]) for row in with_edges) for place in (0, 1)
    )

    def of(count: int) -> str:
        return f"{count} of {len(counted)} ({100 * count / max(1, len(counted)):.1f} %)"

    return [
        f"prepare, run and convert: {of(len(done))}",
        f"bit-exact: {of(len(exact))}",
        f">= 99 % of Linear/Conv multiply-adds quantized: {of(_at_least(done, 'macs', 0.99))}",
        f">= 95 % of executed calls in the graph: {of(_at_least(done, 'calls', 0.95))}",
        f"index edges: {carried} of {total} ({100 * carried / max(1, total):.1f} %)",
        f"not counted, output ignores input: {len(rows) - len(counted)}",
    ]


def _at_least(rows: list[dict[str, Any]], key: str, bound: float) -> int:
    return sum(row[key] != "" and row[key] >= bound for row in rows)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--family", choices=list(FAMILIES), action="append")
    options.add_argument("--only", action="append", help="part of a model's name")
    options.add_argument("--json", type=Path)
    options.add_argument("--markdown", type=Path)
    chosen = options.parse_args()
    warnings.filterwarnings("ignore")
    found = _known(chosen.json)
    for family in chosen.family or FAMILIES:
        for entry in FAMILIES[family]():
            if chosen.only and not any(part in entry[0] for part in chosen.only):
                continue
            row = measure(entry)
            if row is not None:
                found[row["model"]] = row
                print(
                    " ".join(f"{key}={row[key]}" for key in COLUMNS if row[key] != ""), flush=True
                )
            gc.collect()
            _write(chosen, list(found.values()))
    _write(chosen, list(found.values()))
    rows = list(found.values())
    print(Table(COLUMNS, rows, title="coverage", notes=summarise(rows)))


def _known(path: Path | None) -> dict[str, dict[str, Any]]:
    """Rows of an earlier run, by model: what is measured anew takes their place."""
    if path is None or not path.exists():
        return {}
    return {row["model"]: row for row in json.loads(path.read_text())["models"]}


def _write(chosen: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """After every model: a run may be stopped."""
    if chosen.json:
        chosen.json.write_text(json.dumps({"figures": summarise(rows), "models": rows}, indent=1))
    if chosen.markdown:
        chosen.markdown.write_text(_markdown(rows))


def _markdown(rows: list[dict[str, Any]]) -> str:
    columns = [column for column in COLUMNS if not column.endswith(" s")]
    head = "\n".join(f"- {line}" for line in summarise(rows))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in rows]
    command = "`python benchmarks/coverage.py --markdown docs/coverage.md`"
    about = (__doc__ or "").split("\n\n")[3].strip()
    table = "\n".join(lines)
    return f"# Coverage\n\nMade by {command}.\n{about}\n\n{head}\n\n{table}\n"


if __name__ == "__main__":
    main()
