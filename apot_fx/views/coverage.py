"""Coverage: how much of a model is quantized, and how much flows as indices."""

from __future__ import annotations

from torch import nn

from ..nn import ConvertedRecurrent, ConvertedWeighted, PreparedRecurrent, PreparedWeighted
from ..passes.annotate import has_weights, is_computed_inside
from ..passes.edges import index_edges
from ..passes.tree import stage_info, stages


def coverage_notes(model: nn.Module) -> list[str]:
    """Lines for people below a table."""
    inside, outside = _parameters(model)
    layers, floats = _layers(model)
    lines = [
        f"{layers} of {layers + floats} layers quantized, {_percent(inside, inside + outside)} of "
        "their weights"
    ]
    known = stage_info(model)
    if known is not None and known.work is not None:
        work = known.work
        both = work.quantized + work.float_layers
        lines.append(
            f"{_percent(work.quantized, both)} of the layers' multiply-adds quantized; products of "
            f"activations are {_percent(work.products, both + work.products)} of all"
        )
    else:
        lines.append("multiply-adds are known once calibrate has run")
    carried, edges = (sum(column) for column in zip(*_edges(model), strict=True))
    lines.append(f"{carried} of {edges} edges from layer to layer carried as indices")
    return lines


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "none"


def _edges(model: nn.Module) -> list[tuple[int, int]]:
    return [(0, 0), *(index_edges(stage) for stage in stages(model).values())]


_QUANTIZED = (PreparedWeighted, ConvertedWeighted, PreparedRecurrent, ConvertedRecurrent)


def _layers(model: nn.Module) -> tuple[int, int]:
    """Quantized layers, and layers left in float."""
    quantized = sum(isinstance(m, _QUANTIZED) for m in model.modules())
    return quantized, sum(map(_is_float, model.modules()))


def _is_float(module: nn.Module) -> bool:
    quantized = isinstance(module, _QUANTIZED) or is_computed_inside(module)
    return has_weights(module) and not quantized


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
        elif _is_float(module):
            outside += sum(p.numel() for p in module.parameters(recurse=False))
    return inside, outside
