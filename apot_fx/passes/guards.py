"""Checks that a traced graph makes at every call: what the trace took for granted still holds.

Each is the target of a graph node and raises GuardError, with the remedy, where a call is of
another kind than the example inputs were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch

from ..errors import GuardError


def _refuse(what: str, line: str = "") -> NoReturn:
    raise GuardError(f"{what}; prepare with example_inputs of this kind", line)


def _is_as(value: object, expected: object) -> bool:
    """Whether a None, bool or string is the expected one."""
    return value is expected or (isinstance(value, str) and value == expected)


def check_option(value: object, fixed: object, name: str) -> None:
    """Graph node: an option that the trace has fixed must be passed as it was traced.

    Raises GuardError otherwise.
    """
    if not _is_as(value, fixed):
        raise GuardError(
            f"argument {name!r} was traced as {fixed!r} and is now another; prepare with "
            f"example_inputs in which {name!r} is of this kind"
        )


def check_same(value: object, other: object, name: str) -> None:
    """Graph node: an argument is the very tensor that another is; raises GuardError else."""
    if value is not other:
        raise GuardError(
            f"argument {name!r} was the same tensor as another in the example_inputs and is not "
            "now; prepare with example_inputs of this kind"
        )


def check_given(value: object, name: str) -> None:
    """Graph node: a tensor that the example gave, and need not, is given; GuardError else."""
    if value is None:
        raise GuardError(
            f"{name!r} was given in the example_inputs and is None now; prepare with "
            "example_inputs of this kind"
        )


def check_count(values: tuple[Any, ...], count: int, name: str) -> None:
    """Graph node: as many ``*args`` as were traced; raises GuardError otherwise."""
    if len(values) != count:
        raise GuardError(
            f"{name}: traced with {count} of them, got {len(values)}; pass such example_inputs"
        )


def check_keywords(values: Mapping[str, Any], names: list[str], name: str) -> None:
    """Graph node: the same ``**kwargs`` as were traced; raises GuardError otherwise."""
    if sorted(values) != names:
        odd = sorted(set(values) ^ set(names))
        raise GuardError(
            f"**{name}: {', '.join(odd)} given otherwise than while tracing; pass example_inputs "
            "that hold the same keyword arguments"
        )


def check_fact(value: object, expected: object, name: str) -> None:
    """Graph node: None, a bool or a string in an argument is as in the example (GuardError)."""
    if not _is_as(value, expected):
        plain = value is None or isinstance(value, (bool, str))
        now = repr(value) if plain else f"a {type(value).__name__}"
        raise GuardError(
            f"{name} held {expected!r} in the example_inputs and holds {now} now; prepare with "
            "example_inputs of this kind"
        )


def kind_of(value: object) -> str:
    """What a decision by ``isinstance`` asks for."""
    return "Tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def check_kind(value: object, kind: str, name: str) -> None:
    """Graph node: an argument is of the kind that it was in the example (GuardError)."""
    if kind_of(value) != kind:
        raise GuardError(
            f"{name} was a {kind} in the example_inputs and is a {kind_of(value)} now; prepare "
            "with example_inputs of this kind"
        )


def check_length(value: Any, count: int, name: str) -> None:
    """Graph node: a sequence or mapping has as many members as in the example (GuardError)."""
    if len(value) != count:
        raise GuardError(
            f"{name} had {count} members in the example_inputs and has {len(value)} now; prepare "
            "with example_inputs of this kind"
        )


def check_keys(value: Mapping[Any, Any], keys: list[Any], name: str) -> None:
    """Graph node: a mapping has the keys that it had in the example, in order (GuardError)."""
    if list(value) != keys:
        raise GuardError(
            f"{name} had the keys {keys} in the example_inputs and has {list(value)} now; prepare "
            "with example_inputs of this kind"
        )


def check_member(value: Mapping[Any, Any], key: Any, expected: bool, name: str) -> None:
    """Graph node: a mapping has a key, or not, as in the example (GuardError)."""
    if (key in value) != expected:
        then, now = ("had", "has not") if expected else ("did not have", "has")
        raise GuardError(
            f"{name} {then} {key!r} in the example_inputs and {now} it now; prepare with "
            "example_inputs of this kind"
        )


def check_decision(value: object, expected: object, line: str) -> None:
    """Graph node: what the trace has decided by an example must come out the same.

    Raises GuardError otherwise.
    """
    found = bool(value) if isinstance(expected, bool) else value
    if found != expected:
        raise GuardError(
            f"{line} decides by what came out as {expected} for the example_inputs and as {found} "
            "now; prepare with example_inputs of this kind",
            line,
        )
