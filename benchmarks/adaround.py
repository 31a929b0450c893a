"""AdaRound against rounding to nearest on the depthwise digits network, held-out folds.

Run alone (`python benchmarks/adaround.py [--quick] [presets …]`) or by `make bench`; needs the demo
extra. Five seeds, five folds of all 1,797 images each (`--quick`: one seed). In every fold a float
network is trained on the other four, calibrated on these images, and rounded both ways: same α (the
preset's, per channel by squared error), same activations. Logits are compared on the fold. Gains
are ratios of means over all runs; their standard errors are the jackknife's, over runs. Prints a
table and writes `benchmarks/adaround.json`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from sklearn import datasets, model_selection
from torch import nn
from tqdm import tqdm

import apot_fx
from apot_fx.demo.models import SeparableNet
from apot_fx.demo.run import Digits, train
from apot_fx.ptq import adaround
from apot_fx.table import Table

PRESETS = ("w3a3", "w3a8", "w4a4")
SEEDS, FOLDS, EPOCHS = 5, 5, 30
REACH = 0.7  # of both gains at 3-bit weights
COLUMNS = (
    "preset",
    "form",
    "MSE of logits",
    "accuracy %",
    "MSE gain",
    "accuracy gain",
    "parity",
    "s",
)

#: Of one run and preset: MSE nearest, MSE AdaRound, accuracy nearest, AdaRound, float.
Run = tuple[float, float, float, float, float]


def folds(seed: int) -> Iterator[Digits]:
    """All images, split by label; a fold is the test part."""
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    split = model_selection.StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    for rest, held in split.split(images, labels):
        yield Digits(x[rest], y[rest], x[held], y[held])


@torch.no_grad()
def judged(model: nn.Module, stage: nn.Module, digits: Digits) -> tuple[float, float]:
    """MSE of a stage's logits against the float model's, and its accuracy."""
    expected, found = model(digits.test_x), stage(digits.test_x)
    hits = (found.argmax(1) == digits.test_y).double().mean()
    return float((found - expected).square().mean()), float(hits)


def measure(model: nn.Module, preset: str, digits: Digits, seed: int) -> tuple[Run, bool, float]:
    """One run, whether prepared and converted agree in every bit, and AdaRound's seconds."""
    batches = digits.train_x.split(128)
    prepared = apot_fx.prepare_apot(model, preset)
    apot_fx.calibrate(prepared, batches, progress=False)
    mse, accuracy = judged(model, prepared, digits)
    start = time.perf_counter()
    adaround(prepared, batches, seed=seed, progress=False)
    seconds = time.perf_counter() - start
    converted = apot_fx.convert_apot(prepared)
    exact = apot_fx.check_parity(prepared, converted, [digits.test_x]).ok
    ada, learned = judged(model, converted, digits)
    return (mse, ada, accuracy, learned, judged(model, model, digits)[1]), exact, seconds


def mse_gain(runs: Sequence[Run]) -> float:
    nearest, ada = (statistics.fmean(run[place] for run in runs) for place in (0, 1))
    return (nearest - ada) / nearest


def accuracy_gain(runs: Sequence[Run]) -> float:
    nearest, ada, whole = (statistics.fmean(run[place] for run in runs) for place in (2, 3, 4))
    return (ada - nearest) / (whole - nearest)


def with_error(value: Callable[[Sequence[Run]], float], runs: list[Run], digits: int = 3) -> str:
    """A figure of all runs and its standard error by leaving out one run at a time."""
    left_out = [value([*runs[:place], *runs[place + 1 :]]) for place in range(len(runs))]
    centre, count = statistics.fmean(left_out), len(runs)
    error = ((count - 1) / count * sum((one - centre) ** 2 for one in left_out)) ** 0.5
    return f"{value(runs):.{digits}f} ± {error:.{digits}f}"


def rows_of(preset: str, runs: list[Run], exact: bool, seconds: float) -> list[dict[str, object]]:
    def mean(place: int, scale: float = 1.0, digits: int = 3) -> str:
        return with_error(
            lambda some: scale * statistics.fmean(r[place] for r in some), runs, digits
        )

    gains = with_error(mse_gain, runs), with_error(accuracy_gain, runs)
    parity = "bit-exact" if exact else "DIFFERS"
    cells = (
        (preset, "nearest", mean(0), mean(2, 100, 2), "", "", "", ""),
        (preset, "AdaRound", mean(1), mean(3, 100, 2), *gains, parity, f"{seconds:.0f}"),
        (preset, "float", "0", mean(4, 100, 2), "", "", "", ""),
    )
    return [dict(zip(COLUMNS, row, strict=True)) for row in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=PRESETS)
    parser.add_argument("--quick", action="store_true", help="one seed")
    options = parser.parse_args()
    seeds = 1 if options.quick else SEEDS
    found: dict[str, list[tuple[Run, bool, float]]] = {name: [] for name in options.presets}
    work = [
        (seed, fold, digits) for seed in range(seeds) for fold, digits in enumerate(folds(seed))
    ]
    for seed, fold, digits in tqdm(work, "runs", disable=None):
        torch.manual_seed(FOLDS * seed + fold)
        model = SeparableNet()
        train(model, digits, EPOCHS, 4e-3, seed)
        for preset in options.presets:
            found[preset].append(measure(copy.deepcopy(model), preset, digits, seed))
    rows, missed = [], []
    for preset, measured in found.items():
        runs = [run for run, _, _ in measured]
        seconds = statistics.fmean(time for _, _, time in measured)
        rows += rows_of(preset, runs, all(exact for _, exact, _ in measured), seconds)
        if preset.startswith("w3") and min(mse_gain(runs), accuracy_gain(runs)) < REACH:
            missed.append(preset)
    notes = [
        f"{seeds} seeds x {FOLDS} folds, all 1,797 images held out once a seed; ± standard errors",
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
    ]
    table = Table(COLUMNS, rows, title="AdaRound, depthwise digits network", notes=notes)
    print(table)
    Path(__file__).with_suffix(".json").write_text(table.to_json() + "\n", encoding="utf-8")
    if missed:
        raise SystemExit(f"a gain is below {REACH}: {', '.join(missed)}")


if __name__ == "__main__":
    main()
