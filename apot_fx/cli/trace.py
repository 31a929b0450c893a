"""Prepare a model and print what every pass changed and left, and its graph."""

from __future__ import annotations

import argparse

from ..table import Table


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="my_module:build_model, a model or what builds it")
    command.add_argument("--config", default="w4a4", help="a preset (default w4a4)")


def run(options: argparse.Namespace) -> int:
    from ..api import explain, prepare_apot
    from ..passes.tree import joined, reports
    from .loading import load_model

    prepared = prepare_apot(load_model(options.model), options.config)
    rows: list[dict[str, object]] = [
        {"pass": report.name, "": kind, "where": joined(path, note.where), "what": note.what}
        for path, report in reports(prepared)
        for kind, notes in (("changed", report.changed), ("left", report.left))
        for note in notes
    ]
    passes = Table(("pass", "", "where", "what"), rows, title="passes")
    for table in (passes, explain(prepared)):
        print(table.to_json() if options.json else f"{table}\n")
    return 0
