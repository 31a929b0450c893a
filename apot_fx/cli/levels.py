"""Print a level set: index, code, exponents, integer level, value."""

from __future__ import annotations

import argparse

from ..errors import LevelSetError
from ..levels import LevelSet
from ..table import Table

KINDS = ("apot", "uniform", "pot", "fp4")


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bits", type=int, default=4, help="bits in all (default 4)")
    command.add_argument("--k", type=int, default=2, help="bits per term, kind apot (default 2)")
    command.add_argument("--signed", action="store_true", help="with negative levels")
    command.add_argument("--scheme", default="paper", help="paper or torch (kind apot)")
    command.add_argument("--kind", choices=KINDS, default="apot")
    command.add_argument("--alpha", type=float, default=1.0, help="clip value (default 1)")


def run(options: argparse.Namespace) -> int:
    table = level_table(level_set_of(options), options.alpha)
    print(table.to_json() if options.json else table)
    return 0


def level_set_of(options: argparse.Namespace) -> LevelSet:
    """The level set that the options describe; raises LevelSetError."""
    if options.kind == "apot":
        return LevelSet.apot(options.bits, options.k, options.signed, options.scheme)
    if options.kind == "uniform":
        return LevelSet.uniform(options.bits, options.signed)
    return LevelSet.pot(options.bits, options.signed) if options.kind == "pot" else LevelSet.fp4()


def level_table(level_set: LevelSet, alpha: float) -> Table:
    """One row per index; value is level · α / unit. Raises LevelSetError for an impossible α."""
    if not 2.0**-40 <= alpha <= 2.0**40:
        raise LevelSetError(f"alpha is {alpha}; it must lie in [2^-40, 2^40]")
    width = (len(level_set.code_indices) - 1).bit_length()
    rows: list[dict[str, object]] = [
        {
            "index": index,
            "code": f"{level_set.codes[index]:0{width}b}",
            "exponents": " ".join(
                f"{'-' if sign < 0 else '+'}2^{-exponent}"
                for (sign, _), exponent in zip(
                    level_set.terms(index), level_set.exponents(index), strict=True
                )
            ),
            "level": level,
            "value": level * alpha / level_set.unit,
        }
        for index, level in enumerate(level_set.levels)
    ]
    note = f"{len(level_set)} levels, unit {level_set.unit}, {level_set.bits} stored bits"
    columns = ("index", "code", "exponents", "level", "value")
    return Table(columns, rows, title=level_set.spec, notes=[note])
