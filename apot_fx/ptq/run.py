"""``adaround``: the whole of it, from batches to committed roundings."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..batches import Forward, check_batches, evaluating, run_batch
from ..errors import CalibrationError, ConfigError, StageError
from ..fake_quant import FakeQuantize
from ..graph import copy_of
from ..passes.tree import stage_info, stages
from ..pipeline import check_convertible, require_stage
from ..table import Table
from .capture import Runs, collect
from .checkpoint import Checkpoint, Learned, check_path
from .learn import SEEDS, Settings, commit, learn, mean_error
from .origin import Origin
from .samples import Samples
from .shelf import Shelf
from .units import Unit, find_units
from .weights import find_weights

_COLUMNS = ("weight", "moved %", "learned with", "error before", "error after", "why")


def adaround(
    prepared: nn.Module,
    batches: Iterable[Any],
    *,
    forward: Forward | None = None,
    steps: int = 500,
    batch_size: int = 32,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    cache_limit: int = 2**30,
    progress: bool = True,
) -> Table:
    """Learn for each weight whether it goes to the level below or above, and commit that.

    Unit by unit, in the order in which they run: blocks of the graphs (residual blocks, three
    layers of a chain) and layers that Python code calls. A unit gets what the model quantized so
    far gives it, its own activation quantizers included, and shall give what the float model gives.
    α, level sets and biases stay. A learned weight is then moved onto its level, so rounding to
    nearest gives the learned index, in prepared, in converted and from a saved state_dict. On any
    error or interruption ``prepared`` is as it was. Random state and modes are restored.

    Args:
        prepared: a calibrated prepared model; its float weights change.
        batches: as for ``calibrate``; some hundred samples. Read once.
        forward: as for ``calibrate``; by default the one that ``calibrate`` was given.
        steps: of Adam, per unit.
        batch_size: rows in a step, where a tensor's first axis is the batch; else a whole call.
        seed: results hang on it, on the batches and the options alone (on one machine, with as many
            threads).
        checkpoint: a file that keeps what was learned; where it exists already, the run that wrote
            it is resumed, to the same bits as if it had never stopped.
        cache_limit: bytes of batches and activations in memory; what is more lies in a temporary
            file. Beside it there is one copy of the model.
        progress: show a progress bar with the loss on a terminal.

    Returns:
        A row per quantized weight: how many elements moved away from their nearest level, the
        error of its unit before and after (mean squared, relative to the variance of the float
        result), and why it was left at its nearest levels.

    Raises:
        StageError: not a prepared model, or a quantizer that is off or follows its observer.
        CalibrationError: not calibrated, no batch, one that does not run or gives NaN.
        ConfigError: steps, batch_size, seed or cache_limit out of range.
        StateError: ``checkpoint`` can't be written, is no such file, or is of another model or
            forward, or other options, batches or weights.

    Source: Nagel, Amjad, van Baalen, Louizos, Blankevoort, *Up or Down? Adaptive Rounding for
    Post-Training Quantization*, ICML 2020, equations 21 to 25.

    >>> import apot_fx
    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    >>> batches = [torch.randn(32, 8) for _ in range(4)]
    >>> prepared = apot_fx.prepare_apot(model, apot_fx.QConfig.from_preset("w3a8"))
    >>> apot_fx.calibrate(prepared, batches)
    >>> table = adaround(prepared, batches, steps=100)
    >>> [(row["weight"], row["learned with"]) for row in table.rows]
    [('0.weight', '0 … 2'), ('2.weight', '2')]
    >>> table.rows[0]["error after"] <= table.rows[0]["error before"]
    True
    """
    settings = _checked(prepared, steps, batch_size, seed, cache_limit)
    path = check_path(checkpoint)
    known = stage_info(prepared)
    call = forward or (known and known.forward) or run_batch
    with torch.inference_mode(False), Shelf(cache_limit) as shelf, evaluating(prepared):
        kept = [shelf.put(batch) for batch in check_batches(batches)]
        if not kept:
            raise CalibrationError("adaround got no batch; pass at least one")
        data = (batch.take() for batch in kept)
        origin = None if path is None else Origin.of(settings, prepared, data, call)
        file = Checkpoint(path, origin)
        run = _Run(prepared, Runs(kept, call), settings, file, cache_limit - shelf.held)
        run.learn(progress)
        return run.commit()


def _checked(
    prepared: object, steps: int, batch_size: int, seed: int, cache_limit: int
) -> Settings:
    """Everything that is refused, before anything is run."""
    model = require_stage(prepared, "prepared", "adaround")
    ranges = {
        "steps": (steps, 1, math.inf),
        "batch_size": (batch_size, 1, math.inf),
        "seed": (seed, 0, SEEDS - 1),
        "cache_limit": (cache_limit, 0, math.inf),
    }
    for name, (value, low, high) in ranges.items():
        if type(value) is not int or not low <= value <= high:
            until = "on" if high == math.inf else f"to {high}"
            raise ConfigError(f"adaround: {name} is {value!r}; an int from {low} {until} is wanted")
    check_convertible(model, "adaround")
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize) and module.observer_enabled:
            raise StageError(
                f"adaround: {name} follows its observer, so its alpha would move; "
                "prepared.apply(disable_observer) first"
            )
    return Settings(steps, batch_size, seed)


class _Run:
    """One run on a copy of the model, which is committed unit by unit; the model itself at the end.

    ``prepared`` with its quantizers off is the float model meanwhile.
    """

    def __init__(
        self, prepared: nn.Module, runs: Runs, settings: Settings, file: Checkpoint, limit: int
    ) -> None:
        self.prepared, self.runs, self.settings, self.file = prepared, runs, settings, file
        self.limit = limit
        self.student = copy_of(prepared).eval().requires_grad_(False)
        self.weights, self.left = find_weights(self.student)
        layers = {weight.layer for weight in self.weights.values()}
        order, self.times = runs.first(self.student, layers | stages(self.student).keys())
        self.units = find_units(self.student, self.weights, order)
        file.check(self.units, self.weights)
        for name, weight in self.weights.items():
            if weight.layer not in order:
                self.left[name] = "no batch ran it"

    def learn(self, progress: bool) -> None:
        """Learn what the file doesn't know yet."""
        from tqdm import tqdm

        steps = self.settings.steps
        total = steps * len(self.units)
        with tqdm(total=total, unit="step", disable=None if progress else True) as bar:
            for number, unit in enumerate(self.units):
                bar.set_description(f"adaround {unit.name}")

                def show(loss: float | None) -> None:
                    bar.update()
                    if loss is not None:
                        bar.set_postfix(loss=f"{loss:.4g}", refresh=False)

                learned = self.file.units.get(unit.name)
                if learned is None:
                    learned = self._learn(unit, number, show)
                    self.file.add(unit.name, learned)
                bar.update((number + 1) * steps - bar.n)
                for name, up in learned.up.items():
                    commit(self.weights[name], up)

    def _learn(self, unit: Unit, number: int, show: Callable[[float | None], None]) -> Learned:
        """A unit's roundings; none where they are no better than the nearest levels."""
        student, settings = self.student, self.settings
        weights = {name: self.weights[name] for name in (*unit.weights, *unit.ahead)}
        floats = {name: weight.value.clone() for name, weight in weights.items()}
        with Shelf(max(0, self.limit)) as cache:
            calls = collect(unit, student, self.prepared, self.runs, self.times, cache)
            if not calls:
                return Learned(0.0, 0.0, {})
            run = unit.bound(student)
            samples = Samples(calls, run, settings.batch_size)
            before = mean_error(run, samples)
            if not math.isfinite(before):
                raise CalibrationError(
                    f"adaround: {unit.name} gives NaN or inf for a batch; drop that batch, or "
                    "repair the weights"
                )
            up: dict[str, torch.Tensor] = {}
            if before > 0:
                up = learn(run, weights, samples, before, settings, number, show)
            for name, chosen in up.items():
                commit(weights[name], chosen)
            after = mean_error(run, samples)
        for name, weight in weights.items():
            weight.value.copy_(floats[name])
        if not after < before:
            return Learned(before, before, {})
        return Learned(before, after, {name: up[name] for name in unit.weights})

    def commit(self) -> Table:
        """Move the model's own weights, all or none, and tell."""
        del self.student, self.weights
        weights, _ = find_weights(self.prepared)
        floats: dict[str, torch.Tensor] = {}
        moved: dict[str, float] = {}
        try:
            for learned in self.file.units.values():
                for name, up in learned.up.items():
                    floats[name] = weights[name].value.clone()
                    moved[name] = commit(weights[name], up)
        except BaseException:
            for name, value in floats.items():
                weights[name].value.copy_(value)
            raise
        rows = [
            self._told(unit, name, moved.get(name)) for unit in self.units for name in unit.weights
        ]
        rows += [_row(name, None, "", None, None, why) for name, why in self.left.items()]
        title = f"adaround: {len(self.units)} units, {self.settings.steps} steps each"
        return Table(_COLUMNS, rows, title=title)

    def _told(self, unit: Unit, name: str, moved: float | None) -> dict[str, object]:
        learned = self.file.units[unit.name]
        why = "" if moved is not None else "nothing better than the nearest was found"
        return _row(name, moved or 0.0, unit.name, learned.before, learned.after, why)


def _row(*cells: object) -> dict[str, object]:
    return dict(zip(_COLUMNS, cells, strict=True))


__all__ = ["adaround"]
