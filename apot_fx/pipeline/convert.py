"""Convert: lower every stage and every standalone layer of a prepared model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from ..errors import (
    CalibrationError,
    ConfigError,
    LevelSetError,
    StageError,
    TensorError,
    did_you_mean,
)
from ..fake_quant import EXACT_UNIT, OBSERVING, FakeQuantize
from ..graph import called_module, copy_of, substitute
from ..nn import (
    PreparedLayer,
    PreparedOp,
    PreparedRecurrent,
    PreparedWeighted,
    convert_standalone,
    input_fake_quants,
    keep_children,
)
from ..passes import convert_passes, keep_passes, run_passes
from ..passes.functional_layers import computed_operands
from ..passes.stage import grids_of
from ..passes.tree import joined, stage_info, stages, standalone
from .tied import share_packed, shared_fake_quants

#: So many layers are named by one error.
_NAMED = 8
BACKENDS = ("auto", "reference")


def convert(prepared: nn.Module, backend: str, low_memory: bool, inplace: bool) -> nn.Module:
    """Lower a prepared model to packed integer weights and indices between layers."""
    if backend not in BACKENDS:
        raise ConfigError(
            f"unknown backend {backend!r}; known: {', '.join(BACKENDS)}."
            f"{did_you_mean(backend, BACKENDS)}"
        )
    check_convertible(prepared, "convert_apot")
    model = prepared if inplace else copy_of(prepared)
    model.eval()
    tied, sharing = shared_fake_quants(model), _sharing(model)
    shared = frozenset(id(op._parameters) for op in sharing)
    for stage in stages(model).values():
        run_passes(stage, keep_passes())
    _convert_standalone(model, low_memory, shared)
    for stage in reversed(stages(model).values()):  # inner ones first
        run_passes(stage, convert_passes(low_memory, shared))
        stage.apot.kind = "converted"
    known = stage_info(model)
    assert known is not None
    known.kind = "converted"
    share_packed(model, tied)
    _release(model, sharing)
    return model


def _sharing(model: nn.Module) -> list[PreparedOp]:
    """Operators whose Parameters another module has too, or that more than one stage calls: a layer
    that several stages call was prepared for each, with one registry."""
    users = Counter(id(module._parameters) for module in model.modules())
    calls: Counter[int] = Counter()
    for stage in stages(model).values():
        calls.update({id(called_module(stage, node)) for node in stage.graph.nodes})
    return [
        op
        for op in model.modules()
        if isinstance(op, PreparedOp) and (users[id(op._parameters)] > 1 or calls[id(op)] > 1)
    ]


def _release(model: nn.Module, ops: list[PreparedOp]) -> None:
    """Free what operators shared and nothing of the model has any more."""
    used = {id(module._parameters) for module in model.modules()}
    for op in ops:
        if id(op._parameters) not in used:
            op.release()


def _convert_standalone(model: nn.Module, low_memory: bool, shared: frozenset[int]) -> None:
    made: dict[int, nn.Module] = {}
    for layer in standalone(model).values():
        assert isinstance(layer, PreparedOp)
        converted: nn.Module
        if isinstance(layer, PreparedWeighted) and layer.read_at:
            converted = layer.in_float()
        else:
            converted = convert_standalone(layer, low_memory)
            if id(layer._parameters) not in shared:
                layer.release()
        keep_children(layer, converted)
        made[id(layer)] = converted
    substitute([model], made)


def check_convertible(prepared: nn.Module, verb: str) -> None:
    """Everything convert refuses, before anything is touched; ``verb``: who asks."""
    _check_calibrated(prepared, verb)
    for name, weight in _weights(prepared):
        _check_values(name, weight)
    floats = tuple(
        f"{path}."
        for path, op in standalone(prepared).items()
        if isinstance(op, PreparedWeighted) and op.read_at
    )
    for name, module in prepared.named_modules():
        if not isinstance(module, FakeQuantize) or name.startswith(floats):
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


def _weights(prepared: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight that will be packed, by name."""
    for path, stage in stages(prepared).items():
        for node in stage.graph.nodes:
            layer = called_module(stage, node)
            if isinstance(layer, PreparedLayer):
                weight, _ = layer.operands(*computed_operands(stage, node) or (None, None))
                yield f"{joined(path, str(node.target))}.weight", weight
    for path, op in standalone(prepared).items():
        if isinstance(op, PreparedRecurrent):
            yield from ((f"{path}.{name}", weight) for name, weight in op.weights.items())
        elif isinstance(op, PreparedWeighted):
            yield f"{path}.weight", op.operands(None, None)[0]


def _input_quants(prepared: nn.Module) -> Iterator[tuple[str, str, FakeQuantize]]:
    """For every quantized layer's call: the layer, its input's fake-quant's name, and that."""
    for path, stage in stages(prepared).items():
        for node in stage.graph.nodes:
            layer = called_module(stage, node)
            if not isinstance(layer, PreparedOp) or layer.standalone:
                continue
            own = joined(path, str(node.target))
            for module in (module for _, module in grids_of(node) if module is not None):
                quant = stage.get_submodule(str(module.target))
                assert isinstance(quant, FakeQuantize)
                yield own, joined(path, str(module.target)), quant
            yield from ((own, name, quant) for name, quant in input_fake_quants(layer).items())
    for path, op in standalone(prepared).items():
        assert isinstance(op, PreparedOp)
        if isinstance(op, PreparedWeighted) and op.read_at:
            continue
        for name, quant in input_fake_quants(op).items():
            yield path, name, quant


def _check_calibrated(prepared: nn.Module, verb: str) -> None:
    waiting = []
    for layer, name, quant in _input_quants(prepared):
        if quant.state == OBSERVING:
            seen = "was observed but not frozen" if quant.seen else "never saw a finite value"
            waiting.append(f"{layer} (its {name} {seen})")
    if waiting:
        more = f" and {len(waiting) - _NAMED} more" if len(waiting) > _NAMED else ""
        raise CalibrationError(
            f"{verb}: still observing: {', '.join(waiting[:_NAMED])}{more}; run "
            "apot_fx.calibrate(prepared, batches), or apot_fx.freeze(prepared) after a loop of "
            "your own; a layer that never runs stays float with "
            "QConfigMapping.set_module_name(layer, None)"
        )


def _check_values(name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise TensorError(f"{name} holds NaN or inf; load a checkpoint from before it diverged")
