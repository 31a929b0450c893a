"""The bodies of prepare, calibrate and convert."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .batches import Forward, check_batches, evaluating, run_all
from .collectives import in_step
from .config import QConfig, QConfigMapping
from .errors import (
    CalibrationError,
    ConfigError,
    LevelSetError,
    StageError,
    TensorError,
    did_you_mean,
)
from .fake_quant import EXACT_UNIT, LEARNING, OBSERVING, FakeQuantize
from .graph import called_module
from .nn import ConvertedOp, PreparedLayer, PreparedOp
from .observer import Observer
from .passes import convert_passes, prepare_passes, run_passes, trace
from .passes.functional_layers import computed_operands
from .passes.stage import StageModule

BACKENDS = ("auto", "reference")


def require_stage(model: object, kind: str, verb: str) -> StageModule:
    """``model`` as a stage of that kind; raises StageError with the step that is missing."""
    found = model.apot.kind if isinstance(model, StageModule) else "float"
    if isinstance(model, StageModule) and found == kind:
        return model
    if not isinstance(model, nn.Module):
        raise StageError(f"{verb} wants a {kind} model, not a {type(model).__name__}")
    remedy = {
        ("float", "prepared"): "call prepare_apot first",
        ("float", "converted"): "call prepare_apot, calibrate and convert_apot first",
        ("prepared", "converted"): "call convert_apot first",
        ("converted", "prepared"): "pass the model that prepare_apot gave",
    }.get((found, kind), "pass another stage")
    name = model.apot.origin.__name__ if isinstance(model, StageModule) else type(model).__name__
    raise StageError(f"{verb} wants a {kind} model, but {name} is {found}; {remedy}")


def prepare(
    model: nn.Module,
    config: str | QConfig | QConfigMapping,
    example_inputs: Any,
    inplace: bool,
) -> StageModule:
    """Trace a float model and put observers and fake-quants into its graph."""
    if not isinstance(model, nn.Module):
        raise StageError(f"prepare_apot wants an nn.Module, not a {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, (PreparedOp, ConvertedOp, FakeQuantize, StageModule)):
            where = f"holds {type(module).__name__} at {name!r}" if name else "is a stage"
            kind = model.apot.kind if isinstance(model, StageModule) else "quantized"
            raise StageError(
                f"prepare_apot wants a float model, but {type(model).__name__} is {kind} "
                f"({where}); pass the float model"
            )
    mapping = QConfigMapping.of(config)
    stage = trace(model if inplace else copy.deepcopy(model), example_inputs)
    run_passes(stage, prepare_passes(mapping))
    stage.apot.kind = "prepared"
    return stage


def activations(stage: nn.Module) -> dict[str, FakeQuantize]:
    """The activation fake-quants of a prepared stage, by name."""
    return {
        name: module
        for name, module in stage.named_modules()
        if isinstance(module, FakeQuantize) and module.observer is not None
    }


def calibrate(
    prepared: StageModule, batches: Iterable[Any], forward: Forward | None, progress: bool
) -> None:
    """Let observers see data, then freeze; on any error the stage is as it was before."""
    from tqdm import tqdm

    quants = [q for q in activations(prepared).values() if q.state != LEARNING]
    before = [(quant, copy.deepcopy(quant.state_dict())) for quant in quants]
    try:
        for quant in quants:
            quant.restart()
        count = 0
        shown = tqdm(
            check_batches(batches), "calibrate", unit="batch", disable=None if progress else True
        )
        device = quants[0].alpha.device if quants else torch.device("cpu")
        with evaluating(prepared):
            for _ in run_all(prepared, in_step(shown, device), forward):
                count += 1
            if not count:
                raise CalibrationError("calibration got no batch; pass at least one")
            for quant in quants:
                if quant.seen:
                    quant.freeze()
    except BaseException:
        for quant, state in before:
            quant.load_state_dict(state)
        raise
    prepared.apot.forward = forward


def merge_observers(prepared: StageModule, others: Sequence[StageModule]) -> None:
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


def _check_copies(prepared: StageModule, other: StageModule) -> None:
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


def convert(prepared: StageModule, backend: str, low_memory: bool, inplace: bool) -> StageModule:
    """Lower a prepared stage to packed integer weights and indices between layers."""
    if backend not in BACKENDS:
        raise ConfigError(
            f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}."
            f"{did_you_mean(backend, BACKENDS)}"
        )
    _check_convertible(prepared)
    stage = prepared if inplace else copy.deepcopy(prepared)
    stage.eval()
    run_passes(stage, convert_passes(low_memory))
    stage.apot.kind = "converted"
    return stage


def _check_convertible(prepared: StageModule) -> None:
    """Everything convert refuses, before anything is touched."""
    _check_calibrated(prepared)
    for node in prepared.graph.nodes:
        layer = called_module(prepared, node)
        if isinstance(layer, PreparedLayer):
            weight, _ = layer.operands(*computed_operands(prepared, node) or (None, None))
            _check_values(f"{node.target}.weight", weight)
    for name, module in prepared.named_modules():
        if not isinstance(module, FakeQuantize):
            continue
        _check_values(f"{name}.alpha", module.alpha)
        level_set = module.known_level_set()
        if level_set.unit > EXACT_UNIT:
            raise LevelSetError(
                f"{name}: {level_set} has unit {level_set.unit}, above {EXACT_UNIT}, the largest "
                "that converts; choose fewer bits or a larger k"
            )
        if not module.fake_quant_enabled:
            raise StageError(
                f"{name}: fake-quant is switched off; prepared.apply(enable_fake_quant) first"
            )


def _check_calibrated(prepared: StageModule) -> None:
    waiting = []
    for node in prepared.graph.nodes:
        layer = called_module(prepared, node)
        if not isinstance(layer, PreparedOp) or len(node.args) < 2 or node.args[1] is None:
            continue
        name = str(node.args[1].target)
        quant = prepared.get_submodule(name)
        assert isinstance(quant, FakeQuantize)
        if quant.state == OBSERVING:
            seen = "was observed but not frozen" if quant.seen else "never ran"
            waiting.append(f"{node.target} (its {name} {seen})")
    if waiting:
        raise CalibrationError(
            f"convert_apot: still observing: {', '.join(waiting)}; run apot_fx.calibrate(prepared, "
            "batches), or apot_fx.freeze(prepared) after a loop of your own"
        )


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise TensorError(f"{name} holds NaN or inf; load a checkpoint from before it diverged")
