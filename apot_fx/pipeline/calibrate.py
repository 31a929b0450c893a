"""Calibrate: let observers see data, then freeze."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..batches import Forward, check_batches, evaluating, run_all
from ..collectives import in_step
from ..errors import CalibrationError
from ..fake_quant import LEARNING, FakeQuantize
from ..nn import PreparedWeighted
from ..passes.stage import Work
from ..passes.tree import stage_info, standalone
from ..values import tensors_in
from .reads import parameter_reads
from .work import counting_work


def activations(model: nn.Module) -> dict[str, FakeQuantize]:
    """The activation fake-quants of a prepared model, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, FakeQuantize) and module.observer is not None
    }


def calibrate(
    prepared: nn.Module, batches: Iterable[Any], forward: Forward | None, progress: bool
) -> None:
    """Let observers see data, then freeze; on any error the stage is as it was before."""
    from tqdm import tqdm

    quants = [q for q in activations(prepared).values() if q.state != LEARNING]
    before = [(quant, copy.deepcopy(quant.state_dict())) for quant in quants]
    try:
        for quant in quants:
            quant.restart()
        shown = tqdm(
            check_batches(batches), "calibrate", unit="batch", disable=None if progress else True
        )
        device = quants[0].alpha.device if quants else torch.device("cpu")
        with evaluating(prepared):
            count, work = _run(prepared, in_step(shown, device), forward)
            if not count:
                raise CalibrationError("calibration got no batch; pass at least one")
            if quants and not any(quant.seen for quant in quants):
                raise CalibrationError(
                    f"no quantizer saw a finite value in {count} batches: they are empty or hold "
                    "NaN and inf alone, or no quantized layer is reached; pass real inputs"
                )
            for quant in quants:
                if quant.seen:
                    quant.freeze()
    except BaseException:
        for quant, state in before:
            quant.load_state_dict(state)
        raise
    known = stage_info(prepared)
    assert known is not None
    known.forward, known.work = forward, work


def _run(
    prepared: nn.Module, batches: Iterable[Any], forward: Forward | None
) -> tuple[int, Work | None]:
    """Run every batch; how many there were, and the multiply-adds of the first."""
    runs = run_all(prepared, batches, forward)
    with counting_work(prepared) as work, parameter_reads(prepared) as reads:
        first = next(runs, None)
    if first is None:
        return 0, None
    if forward is None and not tensors_in(first[1]):
        kind = type(first[1]).__name__
        raise CalibrationError(f"the model gives no tensor but a {kind}")
    for path, layer in standalone(prepared).items():
        if path in reads and isinstance(layer, PreparedWeighted):
            layer.read_at = reads[path]
    return 1 + sum(1 for _ in runs), work
