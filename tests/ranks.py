"""One rank of ``test_distributed``: ``python -m tests.ranks RANK STORE OUT``.

Scenarios take ``(rank, world)`` and return tensors; with ``(0, 1)`` they run on the joined batches
in one process, without ``torch.distributed``. Values are small multiples of powers of two, so that
float sums are exact and no bit hangs on how a batch is split.
"""

from __future__ import annotations

import copy
import datetime
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import apot_fx
from apot_fx import ActivationSpec, FakeQuantize, QConfig, WeightSpec
from apot_fx.errors import CalibrationError
from apot_fx.nn.recurrent import PreparedRNNCell
from apot_fx.passes.stage import StageModule

WORLD = 2
OBSERVERS = ("moving_average", "minmax", "percentile", "mse")
STEPS = 10
LEVELS = torch.tensor([-10, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 10])

Result = dict[str, torch.Tensor]
Switches = dict[int, Callable[[nn.Module], None]]


def on_grid(*shape: int, seed: int, unit: float) -> torch.Tensor:
    """Random 4-bit levels times ``unit``; every row holds the largest, so α = 10 · unit."""
    generator = torch.Generator().manual_seed(seed)
    values = LEVELS[torch.randint(len(LEVELS), shape, generator=generator)] * unit
    values.flatten(1)[:, 0] = 10 * unit
    return values


def network(*layers: nn.Module) -> nn.Module:
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(on_grid(*parameter.shape, 1, seed=seed, unit=1 / 16).squeeze(-1))
    return model


def prepare(model: nn.Module, observer: str) -> StageModule:
    config = QConfig(WeightSpec(observer="minmax"), ActivationSpec(observer=observer))
    return apot_fx.prepare_apot(model, config)


def part(batch: torch.Tensor, rank: int, world: int, first: int) -> torch.Tensor:
    """A rank's part of a joined batch: rank 0 has the ``first`` samples."""
    return batch if world == 1 else (batch[:first], batch[first:])[rank]


def observed(stage: nn.Module) -> Result:
    """α, statistics and state of the activation fake-quants."""
    quants = {n: m for n, m in stage.named_modules() if isinstance(m, FakeQuantize) and m.observer}
    return {
        f"{name}.{key}": value.detach().clone()
        for name, quant in quants.items()
        for key, value in quant.state_dict().items()
    }


def calibration(rank: int, world: int, observer: str) -> Result:
    """Uneven parts; a rank without any sample, and one without a finite value."""
    model = network(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    ).eval()
    batches = [on_grid(6, 2, 8, 8, seed=s, unit=2.0**-s) for s in range(4)]
    batches[2][:2] = float("nan")
    firsts = (3, 1, 2, 6)
    stage = prepare(model, observer)
    parts = [part(b, rank, world, first) for b, first in zip(batches, firsts, strict=True)]
    apot_fx.calibrate(stage, parts, progress=False)
    return observed(stage)


def recurrent_calibration(rank: int, world: int) -> Result:
    """A layer whose states are zero by default: on one rank nothing but zeros comes."""
    config = QConfig(WeightSpec(), ActivationSpec(observer="percentile"))
    layer = PreparedRNNCell.take_over(nn.RNNCell(3, 4, bias=False).eval(), config, "rnn")
    for seed, zeros in enumerate((slice(0, 4), slice(0, 2), slice(2, 4), slice(0, 0))):
        x, state = on_grid(4, 3, seed=seed, unit=1 / 8), on_grid(4, 4, seed=seed, unit=1 / 8)
        x[zeros], state[zeros] = 0, 0
        layer(part(x, rank, world, 2), part(state, rank, world, 2))
    apot_fx.freeze(layer)
    return observed(layer)


def trained(
    stage: StageModule,
    rank: int,
    world: int,
    momentum: float = 0.9,
    switches: Switches | None = None,
) -> Result:
    """STEPS steps of SGD: statistics, state and α after the first forward, Parameters at last."""
    stage.train()
    model: nn.Module = DistributedDataParallel(stage) if world > 1 else stage
    optimizer = torch.optim.SGD(model.parameters(), 0.002, momentum)
    result: Result = {}
    for step in range(STEPS):
        if switches and step in switches:
            stage.apply(switches[step])
        x = on_grid(8, 2, 8, 8, seed=step, unit=1 / 8)
        if step:  # off the grid, so that no value ties with a threshold and α learns
            x = x + torch.rand(x.shape, generator=torch.Generator().manual_seed(step)) / 8
        target = part(torch.arange(step, step + 8) % 3, rank, world, 4)
        loss = nn.functional.cross_entropy(model(part(x, rank, world, 4)), target)
        if not step:
            result.update({f"first.{key}": value for key, value in observed(stage).items()})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result.update({f"last.{key}": value.detach() for key, value in stage.named_parameters()})
    return result


def small() -> StageModule:
    layers = (nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return prepare(network(*layers), "moving_average")


def training_uncalibrated(rank: int, world: int) -> Result:
    """α from the first train forward."""
    return trained(small(), rank, world)


def training_after_calibration(rank: int, world: int) -> Result:
    """α from calibration under ``torch.distributed``."""
    stage = small()
    batch = on_grid(8, 2, 8, 8, seed=100, unit=1 / 8)
    apot_fx.calibrate(stage, [part(batch, rank, world, 3)], progress=False)
    return trained(stage, rank, world)


def training_with_switches(rank: int, world: int) -> Result:
    """In float first, then α led by observers, then learned: every Parameter waits its turn.

    Without momentum: DistributedDataParallel gives a zero gradient where one process gives none,
    and momentum moves what has a gradient.
    """
    switches: Switches = {
        0: apot_fx.disable_fake_quant,
        3: apot_fx.enable_fake_quant,
        4: apot_fx.enable_observer,
        7: apot_fx.disable_observer,
    }
    return trained(small(), rank, world, 0.0, switches)


TRAINING = (training_uncalibrated, training_after_calibration, training_with_switches)


def uneven(rank: int, world: int) -> str:
    """What calibrate says where this rank has ``rank + 1`` batches."""
    stage = small()
    before = copy.deepcopy(stage.state_dict())
    try:
        apot_fx.calibrate(stage, [torch.ones(1, 2, 8, 8)] * (rank + 1), progress=False)
    except CalibrationError as problem:
        same = all(torch.equal(v, before[k]) for k, v in stage.state_dict().items())
        return f"{problem}; unchanged: {same}"
    return "nothing"


def scenarios(rank: int, world: int) -> dict[str, Result]:
    found = {f"calibration {name}": calibration(rank, world, name) for name in OBSERVERS}
    runs = (recurrent_calibration, *TRAINING)
    return found | {run.__name__: run(rank, world) for run in runs}


if __name__ == "__main__":
    rank = int(sys.argv[1])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[2]}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=30),
    )
    torch.save({**scenarios(rank, WORLD), "uneven": uneven(rank, WORLD)}, sys.argv[3])
    dist.destroy_process_group()
