"""What a model is (float, prepared, converted), and what a verb wants of it."""

from __future__ import annotations

from torch import nn

from ..errors import StageError
from ..fake_quant import FakeQuantize
from ..nn import ConvertedOp, PreparedOp
from ..passes.stage import StageModule
from ..passes.tree import stage_info


def require_stage(model: object, kind: str, verb: str) -> nn.Module:
    """``model`` if it is a stage of that kind; else StageError with the step that is missing."""
    if not isinstance(model, nn.Module):
        raise StageError(f"{verb} wants a {kind} model, not a {type(model).__name__}")
    known = stage_info(model)
    found = known.kind if known else "float"
    if found == kind:
        return model
    remedy = {
        ("float", "prepared"): "call prepare_apot first",
        ("float", "converted"): "call prepare_apot, calibrate and convert_apot first",
        ("prepared", "converted"): "call convert_apot first",
        ("converted", "prepared"): "pass the model that prepare_apot gave",
    }.get((found, kind), "pass another stage")
    name = known.origin.__name__ if known else type(model).__name__
    raise StageError(f"{verb} wants a {kind} model, but {name} is {found}; {remedy}")


def require_float(model: object) -> nn.Module:
    """``model`` if nothing of it is quantized yet and its weights can be; else StageError."""
    if not isinstance(model, nn.Module):
        raise StageError(f"prepare_apot wants an nn.Module, not a {type(model).__name__}")
    name, known = type(model).__name__, stage_info(model)
    for path, module in model.named_modules():
        rebuilt = isinstance(module, StageModule) and module.apot.kind == "traced"
        if not rebuilt and isinstance(module, (PreparedOp, ConvertedOp, FakeQuantize, StageModule)):
            where = f"holds {type(module).__name__} at {path!r}" if path else "is a stage"
            kind = known.kind if known else "quantized"
            raise StageError(
                f"prepare_apot wants a float model, but {name} is {kind} ({where}); pass the "
                "float model"
            )
    _check_materialised(model)
    _check_device(model)
    return model


def _check_materialised(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if (
            isinstance(module, nn.modules.lazy.LazyModuleMixin)
            and module.has_uninitialized_params()  # type: ignore[misc]
        ):
            raise StageError(
                f"prepare_apot: {path or type(model).__name__} is a {type(module).__name__} "
                "without weights yet; run the float model once on data first"
            )


def _check_device(model: nn.Module) -> None:
    first: dict[str, str] = {}
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        first.setdefault(str(tensor.device), path)
    if "meta" in first:
        raise StageError(f"prepare_apot: {first['meta']} is on the meta device and has no values")
    if len(first) > 1:
        where = ", ".join(f"{path} on {device}" for device, path in first.items())
        raise StageError(f"prepare_apot wants a model on one device, but has {where}; move it")
