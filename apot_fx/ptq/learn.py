"""Learn the roundings of one unit.

Source: Nagel et al., *Up or Down? Adaptive Rounding for Post-Training Quantization*, ICML 2020,
equations 21 to 25; Li et al., *BRECQ*, ICLR 2021, for blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from .rounding import annealed_beta, regularizer
from .samples import Samples, floats_in
from .soft import SoftWeight
from .units import Run
from .weights import Weight

RATES = 0.01, 0.5  # of Adam: at least, at most
TRAVEL = 50.0  # in between, logits can go so far in all steps together; they start within ±2.4
WEIGHT = 3.0  # of the regularizer's mean, beside an error relative to that of nearest levels
SEEDS = 2**43  # so many; each has one for 2^20 units, and a generator takes 64 bits
WARM_START = 0.2  # the part of the steps that goes without regularizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a unit is learned: steps, rows in a step, and the seed of all units."""

    steps: int
    batch_size: int
    seed: int


@contextmanager
def softened(weights: Mapping[str, Weight]) -> Iterator[dict[str, SoftWeight]]:
    """While open, the layers compute with soft weights in the place of quantized ones."""
    quants = {name: weight.quant for name, weight in weights.items()}
    made = {name: SoftWeight(weight.rows, quants[name]) for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.op._modules[weight.child] = made[name]
        yield made
    finally:
        for name, weight in weights.items():
            weight.op._modules[weight.child] = quants[name]


def learn(
    run: Run,
    weights: Mapping[str, Weight],
    samples: Samples,
    nearest: float,
    settings: Settings,
    number: int,
    progress: Callable[[float | None], None],
) -> dict[str, torch.Tensor]:
    """Which elements of a unit's weights go up, by the weight's name; bool, as rows. May be empty.

    ``nearest``: the unit's error with nearest levels, the unit of its loss, which so hangs on no
    bits and no scale. ``number``: of the unit, part of its seed. ``progress`` is told of every
    step, now and then with the loss.
    """
    generator = torch.Generator().manual_seed((settings.seed << 20) + number)
    with softened(weights) as soft, torch.enable_grad():
        logits = [one.logits for one in soft.values()]
        count = sum(one.numel() for one in logits)
        rate = min(max(RATES[0], TRAVEL / settings.steps), RATES[1])
        optimizer = torch.optim.Adam(logits, rate)
        for step in range(settings.steps):
            inputs, target = samples.draw(generator)
            loss = error(run(inputs), target) / (nearest * samples.power)
            if not loss.requires_grad:  # code inside that gradients don't pass
                return {}
            if step >= WARM_START * settings.steps:
                beta = annealed_beta(step, settings.steps, WARM_START)
                decided = sum((regularizer(v, beta) for v in logits), torch.zeros(()))
                loss = loss + WEIGHT * decided / count
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            progress(loss.item() if step % 50 == 0 or step + 1 == settings.steps else None)
        return {name: one.up() for name, one in soft.items()}


def error(found: object, target: object) -> torch.Tensor:
    """Mean squared difference of all floating-point values of a result."""
    pairs = list(zip(floats_in(found), floats_in(target), strict=True))
    lost = sum(((one.float() - other.float()).square().sum() for one, other in pairs))
    return torch.as_tensor(lost) / max(1, sum(one.numel() for one, _ in pairs))


@torch.no_grad()
def mean_error(run: Run, samples: Samples) -> float:
    """Error over all calls of a unit, relative to the targets' variance, as it rounds now."""
    lost = [float(error(run(inputs), target)) for inputs, target in samples]
    return sum(lost) / len(lost) / samples.power


@torch.no_grad()
def commit(weight: Weight, up: torch.Tensor) -> float:
    """Move a float weight onto its chosen levels; what percentage left their nearest level.

    An element that its dtype can't put there (bfloat16 beside fine levels) stays where it was.
    """
    soft, nearest = SoftWeight(weight.rows, weight.quant), weight.index()
    before = weight.rows.clone()
    chosen = soft.index + up.int()
    weight.write(torch.where(soft.free, soft.committed(up).to(before.dtype), before))
    missed = weight.index().int() != chosen
    if bool(missed.any()):
        weight.write(torch.where(missed, before, weight.rows))
    return 100 * float((weight.index() != nearest).double().mean())
