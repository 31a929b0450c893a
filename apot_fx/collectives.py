"""What the processes (ranks) of a ``torch.distributed`` run agree on.

In one process every function gives back what it was given. Where several run, every rank must make
every call, whatever its own data look like: a rank that skips one leaves the others waiting.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from .errors import CalibrationError


def several_ranks() -> bool:
    """Whether this process is one of several that observe together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def largest_of_ranks(values: torch.Tensor) -> torch.Tensor:
    """The largest value over all ranks, element by element."""
    if several_ranks():
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def sum_of_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks, element by element."""
    if several_ranks():
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.SUM)
    return values


_END = object()


def in_step(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches; raises CalibrationError on every rank where one has fewer than another.

    Without it, observers of the longer ranks would wait for the shorter ones. ``device`` is where
    the ranks exchange whether they go on.
    """
    if not several_ranks():
        yield from batches
        return
    source, count = iter(batches), 0
    while True:
        batch = next(source, _END)
        ends = batch is _END
        some_end, some_go_on = largest_of_ranks(
            torch.tensor([int(ends), int(not ends)], device=device)
        ).tolist()
        if some_end and some_go_on:
            raise CalibrationError(
                f"this rank has {'only' if ends else 'more than'} {count} batches, another has "
                f"{'more' if ends else 'no more'}; ranks observe in step, so give each the same "
                "number (DistributedSampler does)"
            )
        if ends:
            return
        yield batch
        count += 1
