"""Coverage: how much of a model is quantized, and how much flows as indices."""

from __future__ import annotations

from torch import nn

from ..nn import ConvertedRecurrent, ConvertedWeighted, PreparedRecurrent, PreparedWeighted
from ..passes.annotate import has_weights


def coverage_notes(model: nn.Module) -> list[str]:
    """Lines for people below a table."""
    inside, outside = _parameters(model)
    layers, floats = _layers(model)
    total = inside + outside
    share = f"{100 * inside / total:.1f} %" if total else "none"
    return [f"{layers} of {layers + floats} layers quantized, {share} of weights"]


_QUANTIZED = (PreparedWeighted, ConvertedWeighted, PreparedRecurrent, ConvertedRecurrent)


def _layers(model: nn.Module) -> tuple[int, int]:
    """Quantized layers, and layers left in float."""
    quantized = sum(isinstance(m, _QUANTIZED) for m in model.modules())
    floats = sum(has_weights(m) and not isinstance(m, _QUANTIZED) for m in model.modules())
    return quantized, floats


def _parameters(model: nn.Module) -> tuple[int, int]:
    """Weights of quantized layers, and those of layers left in float."""
    inside = outside = 0
    for module in model.modules():
        if isinstance(module, (PreparedWeighted, ConvertedWeighted)):
            inside += module.weight_shape.numel()
        elif isinstance(module, PreparedRecurrent):
            inside += sum(weight.numel() for weight in module.weights.values())
        elif isinstance(module, ConvertedRecurrent):
            inside += sum(part.shape.numel() for part in module.weights.values())
        elif has_weights(module):
            outside += sum(p.numel() for p in module.parameters(recurse=False))
    return inside, outside
