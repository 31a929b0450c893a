"""Print what every preset stands for."""

from __future__ import annotations

import argparse

from ..table import Table


def add_arguments(command: argparse.ArgumentParser) -> None:
    """No options of its own."""


def run(options: argparse.Namespace) -> int:
    from ..config import presets

    rows: list[dict[str, object]] = [dict(row) for row in presets()]
    table = Table(tuple(rows[0]), rows, title="presets (any wXaY and wX, X and Y from 2 to 8)")
    print(table.to_json() if options.json else table)
    return 0
