"""What a unit got and should give, and how steps draw from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..values import tensors_in
from .shelf import Held, Kept
from .units import Run

#: Largest relative squared difference of results that one call gives for rows of several.
_SAME = 1e-3


@dataclasses.dataclass(frozen=True)
class Sample:
    """One call: its inputs, quantized so far, and the float model's result."""

    inputs: Kept
    target: Kept


class Samples:
    """All calls of a unit.

    Steps draw rows of all calls where ``run`` shows that the tensors' first axis is the batch, and
    whole calls where it does not (other sizes in each, recurrent layers with time first).
    """

    def __init__(self, samples: list[Sample], run: Run, size: int) -> None:
        self.samples, self.size = samples, size
        sizes = [_rows(sample) for sample in samples]
        self.by_rows = all(sizes) and _alike(samples) and self._splits(run, sizes)
        self.ends = list(accumulate(sizes)) if self.by_rows else []
        self.power = self._power()

    def _splits(self, run: Run, sizes: list[int]) -> bool:
        """Whether the very first row and the very last give together what they give apart."""
        ends = [(self.samples[0], 0), (self.samples[-1], sizes[-1] - 1)]
        if sum(sizes) < 2:
            return False
        try:
            together = tensors_in(run(self._joined("inputs", [(s, [row]) for s, row in ends])))
            apart = [tensors_in(run(sample.inputs.take())) for sample, _ in ends]
        except Exception:  # its code, or a guard, minds another size
            return False
        for place, found in enumerate(together):
            parts = [one[place][row : row + 1] for one, (_, row) in zip(apart, ends, strict=True)]
            expected = torch.cat(parts)
            if expected.shape != found.shape:
                return False
            lost = (found - expected).double().square().sum()
            if not bool(lost <= _SAME * expected.double().square().sum()):
                return False
        return True

    def _power(self) -> float:
        """Variance of the targets' values (their mean square where they are all alike)."""
        total = squares = 0.0
        count = 0
        for sample in self.samples:
            for target in floats_in(sample.target.take()):
                values = target.double()
                total, squares = total + float(values.sum()), squares + float(values.square().sum())
                count += values.numel()
        if not count or not squares:
            return 1.0
        mean_square = squares / count
        variance = mean_square - (total / count) ** 2
        return variance if variance > 1e-6 * mean_square else mean_square

    def draw(self, generator: torch.Generator) -> tuple[Any, Any]:
        """Inputs and target of one step."""
        if not self.by_rows:
            place = int(torch.randint(len(self.samples), (), generator=generator))
            sample = self.samples[place]
            return sample.inputs.take(), sample.target.take()
        rows = torch.randint(self.ends[-1], (self.size,), generator=generator).sort().values
        chosen, start = [], 0
        for sample, end in zip(self.samples, self.ends, strict=True):
            own = rows[(rows >= start) & (rows < end)] - start
            if len(own):
                chosen.append((sample, own))
            start = end
        return self._joined("inputs", chosen), self._joined("target", chosen)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return ((sample.inputs.take(), sample.target.take()) for sample in self.samples)

    @staticmethod
    def _joined(part: str, chosen: list[tuple[Sample, Any]]) -> Any:
        kept: list[Kept] = [getattr(sample, part) for sample, _ in chosen]
        taken = [
            pytree.tree_leaves(one.take(torch.as_tensor(rows)))
            for one, (_, rows) in zip(kept, chosen, strict=True)
        ]
        return kept[0].rebuild(
            torch.cat(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0]
            for leaves in zip(*taken, strict=True)
        )


def floats_in(value: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a result."""
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def _rows(sample: Sample) -> int:
    """Size of the first axis that all its tensors have in common; 0 where they have none."""
    held = [*sample.inputs.tensors, *sample.target.tensors]
    sizes = {tensor.shape[0] if tensor.shape else 0 for tensor in held}
    return sizes.pop() if len(sizes) == 1 else 0


def _alike(samples: list[Sample]) -> bool:
    """Whether calls differ in nothing but the size of the first axis."""

    def kind(leaf: Any) -> Any:
        return (leaf.shape[1:], leaf.dtype, leaf.device) if isinstance(leaf, Held) else leaf

    def kinds(sample: Sample) -> list[Any]:
        return [kind(leaf) for part in (sample.inputs, sample.target) for leaf in part.leaves]

    first = kinds(samples[0])
    return all(_same(kinds(sample), first) for sample in samples[1:])


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # values whose comparison is no bool
        return False
