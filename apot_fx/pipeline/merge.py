"""Merge: join what copies of one prepared model observed on shards of the data."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from ..batches import evaluating
from ..errors import CalibrationError, StageError
from ..fake_quant import LEARNING, FakeQuantize
from ..observer import Observer
from .calibrate import activations


def merge_observers(prepared: nn.Module, others: Sequence[nn.Module]) -> None:
    """Join statistics and freeze by them; all is checked and computed before anything changes."""
    for place, other in enumerate(others):
        if any(other is seen for seen in (prepared, *others[:place])):
            raise StageError("merge_observers: the same model twice; its data would count twice")
        _check_copies(prepared, other)
    quants, merged = activations(prepared), {}
    for name, quant in quants.items():
        try:
            merged[name] = _merged([quant, *(activations(other)[name] for other in others)])
        except CalibrationError as problem:
            raise CalibrationError(f"merge_observers: {name}: {problem}") from None
    with evaluating(prepared):
        for name, observer in merged.items():
            if observer.seen:
                quants[name].freeze_by(observer)


def _merged(quants: Sequence[FakeQuantize]) -> Observer:
    """One observer with what those of all fake-quants saw; they are left as they are."""
    if any(quant.state == LEARNING for quant in quants):
        raise CalibrationError("its α learns in training already; merge before training")
    merged, *rest = [quant.observer for quant in quants if quant.observer is not None]
    merged = copy.deepcopy(merged)
    for observer in rest:
        merged.merge(observer)
    return merged


def _check_copies(prepared: nn.Module, other: nn.Module) -> None:
    """Refuse to merge what was not calibrated on copies of one prepared model."""
    own, theirs = (
        {name: module for name, module in stage.named_modules() if isinstance(module, FakeQuantize)}
        for stage in (prepared, other)
    )
    for name in [*own, *theirs]:
        if name not in own or name not in theirs:
            raise StageError(f"merge_observers: only one of the models has {name}; pass copies")
        pair = own[name], theirs[name]
        first, second = (f"{q.spec.describe()}, signed {q.known_sign}" for q in pair)
        if first != second or pair[0].spec != pair[1].spec:
            raise StageError(
                f"merge_observers: {name} is {first} in one model and {second} in another; "
                "prepare both alike"
            )
    found = {f"{name}.alpha" for name in activations(prepared)}
    parameters = dict(other.named_parameters())
    for key, value in prepared.named_parameters():
        if key not in found and not _same(value, parameters.get(key)):
            raise StageError(
                f"merge_observers: {key} differs between the models; calibrate copies of one model"
            )


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    if other is None or one.dtype != other.dtype:
        return False
    return torch.equal(one, other.to(one.device))
