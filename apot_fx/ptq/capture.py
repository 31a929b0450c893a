"""Runs of the model: in which order its layers run, what units get and give."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from ..batches import Forward, run_all
from ..passes.purity import unchanged
from ..pipeline import in_float
from .samples import Sample
from .shelf import Kept, Shelf
from .units import Unit


class _Done(BaseException):
    """Ends a forward whose rest nobody asked for; no user's ``except Exception`` catches it."""


class Runs:
    """The batches, and how a model is called with them.

    Random numbers are drawn alike in every run of a batch.
    """

    def __init__(self, batches: list[Kept], forward: Forward) -> None:
        self.batches, self.forward = batches, forward

    def first(
        self, model: nn.Module, paths: Collection[str]
    ) -> tuple[list[str], dict[tuple[str, int], int]]:
        """Run every batch whole: which modules at ``paths`` ran, in order; how often in each batch.

        Raises CalibrationError for a batch that does not run.
        """
        times: dict[tuple[str, int], int] = {}
        now = 0

        def counting(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any) -> None:
                times[path, now] = times.get((path, now), 0) + 1

            return hook

        def given() -> Iterator[Any]:
            nonlocal now
            for now, batch in enumerate(self.batches):
                torch.manual_seed(now)
                yield batch.take()

        hooks = [model.get_submodule(p).register_forward_pre_hook(counting(p)) for p in paths]
        try:
            with unchanged(model):
                for _ in run_all(model, given(), self.forward):
                    pass
        finally:
            for handle in hooks:
                handle.remove()
        return list(dict.fromkeys(path for path, _ in times)), times

    def watched(
        self, model: nn.Module, number: int, watch: Callable[..., Any], calls: int, shelf: Shelf
    ) -> list[Kept]:
        """What the first ``calls`` calls of a unit told in a batch."""
        told: list[Kept] = []

        def tell(value: Any) -> None:
            told.append(shelf.put(value))
            if len(told) == calls:
                raise _Done

        torch.manual_seed(number)
        with suppress(_Done), unchanged(model), watch(model, tell):
            self.forward(model, self.batches[number].take())
        return told


def collect(
    unit: Unit,
    student: nn.Module,
    prepared: nn.Module,
    runs: Runs,
    times: dict[tuple[str, int], int],
    shelf: Shelf,
) -> list[Sample]:
    """Every call of a unit: its input in ``student`` and its result in the float model.

    Calls that only one of the two makes are left out.
    """
    samples: list[Sample] = []
    for number in range(len(runs.batches)):
        calls = times.get((unit.path, number), 0)
        if not calls:
            continue
        inputs = runs.watched(student, number, unit.watch_inputs, calls, shelf)
        with in_float(prepared):
            outputs = runs.watched(prepared, number, unit.watch_outputs, calls, shelf)
        samples += [Sample(*pair) for pair in zip(inputs, outputs, strict=False)]
    return samples
