"""The command line, ``apot-fx``: one file per command, found in ``COMMANDS``.

Exit codes: 0 done, 1 the check the command makes came out negative (parity), 2 wrong use.
torch is imported only by the command that runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ..errors import ApotError
from . import bench, demo, levels, presets, quantize, trace

COMMANDS = {
    "demo": demo,
    "quantize": quantize,
    "trace": trace,
    "levels": levels,
    "presets": presets,
    "bench": bench,
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    root = argparse.ArgumentParser(
        prog="apot-fx",
        description="PyTorch models to Additive-Powers-of-Two integers, checked bit for bit.",
        epilog="Exit codes: 0 done, 1 parity not reached, 2 wrong use.",
    )
    chosen = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        command = chosen.add_parser(name, help=summary, description=module.__doc__)
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; errors that apot_fx raises on purpose are one line, without traceback."""
    options = parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except ApotError as problem:
        print(f"apot-fx {options.command}: {problem}", file=sys.stderr)
        return 2
    return code
