"""Which weights of a prepared model can be learned, and why the others can't.

What is learned is committed by moving the float weight onto the chosen level, in the memory of its
Parameter; so that has to be what the layer reads, and nothing else may read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import fx, nn

from ..fake_quant import FakeQuantize
from ..graph import called_module, constant_value, reads_metadata, value_kind
from ..nn import EMBEDDINGS, PreparedLayer, PreparedOp, PreparedRecurrent, PreparedWeighted
from ..passes.annotate import has_weights, is_computed_inside
from ..passes.functional_layers import computed_operands, constants
from ..passes.stage import StageModule
from ..passes.tree import joined, stages, standalone

Span = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """One quantized weight.

    ``name``: of the weight; ``layer``: path of the operator; ``child``: the operator's name for the
    fake-quant; ``value``: as the user's layer stores it.
    """

    name: str
    layer: str
    op: PreparedOp
    child: str
    value: torch.Tensor

    @property
    def quant(self) -> FakeQuantize:
        quant = self.op._modules[self.child]
        assert isinstance(quant, FakeQuantize)
        return quant

    @property
    def rows(self) -> torch.Tensor:
        value = self.value.detach()
        return self.op.rows(value) if isinstance(self.op, PreparedWeighted) else value

    @torch.no_grad()
    def write(self, rows: torch.Tensor) -> None:
        """Move the float weight, in place."""
        stored = self.op.product.stored(rows) if isinstance(self.op, PreparedLayer) else rows
        self.value.detach().copy_(stored)

    @torch.no_grad()
    def index(self) -> torch.Tensor:
        """What convert would store now: indices as rows."""
        quant = self.quant
        index: torch.Tensor = torch.ops.apot_fx.quantize(
            self.rows, quant.clamped_alpha(), quant.level_spec, quant.axis, quant.group_size
        )
        return index


def find_weights(model: nn.Module) -> tuple[dict[str, Weight], dict[str, str]]:
    """A prepared model's weights that can be learned, and why others can't, by name."""
    found = {weight.name: weight for weight in _all(model)}
    owned = {span[0] for p in model.parameters() if (span := _span(p)) is not None}
    readers = _Readers(model, found.values())
    left: dict[str, str] = {}
    for weight in found.values():
        span = _span(weight.value)
        if isinstance(weight.op, PreparedWeighted) and weight.op.read_at:
            why = f"float: it is read at {weight.op.read_at} without calling the layer"
        elif isinstance(weight.op, tuple(EMBEDDINGS.values())):
            why = "rows of an embedding are not summed: the nearest level is the best"
        elif span is None:
            why = "it is empty"
        elif span[0] not in owned or 0 in weight.value.stride():
            why = "it is computed from other parameters (a parametrization, a hook)"
        else:
            why = readers.other_than(weight, span)
        if why:
            left[weight.name] = why
    return {name: weight for name, weight in found.items() if name not in left}, left


def _all(model: nn.Module) -> Iterator[Weight]:
    seen: set[int] = set()
    for path, stage in stages(model).items():
        for node in stage.graph.nodes:
            layer = called_module(stage, node)
            if not isinstance(layer, PreparedLayer) or layer.standalone or id(layer) in seen:
                continue
            seen.add(id(layer))
            value, _ = layer.operands(*computed_operands(stage, node) or (None, None))
            name = joined(path, str(node.target))
            yield Weight(f"{name}.weight", name, layer, "weight_fake_quant", value)
    for path, op in standalone(model).items():
        if isinstance(op, PreparedRecurrent):
            for name, value in op.weights.items():
                yield Weight(f"{path}.{name}", path, op, f"{name}_fake_quant", value)
        elif isinstance(op, PreparedWeighted):
            value, _ = op.operands(None, None)
            yield Weight(f"{path}.weight", path, op, "weight_fake_quant", value)


def _span(tensor: torch.Tensor) -> Span | None:
    """Storage, first and last byte of a tensor's memory; None where it is empty."""
    if not tensor.numel():
        return None
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    size, start = tensor.element_size(), tensor.storage_offset()
    return tensor.untyped_storage().data_ptr(), int(start * size), int((start + reach + 1) * size)


def _overlap(one: Span, other: Span | None) -> bool:
    return other is not None and one[0] == other[0] and one[1] < other[2] and other[1] < one[2]


class _Readers:
    """Who reads which memory: quantized weights, float layers, float calls in graphs."""

    def __init__(self, model: nn.Module, weights: Iterable[Weight]) -> None:
        self.weights = list(weights)
        self.others = [*_float_layers(model), *_float_calls(model)]

    def other_than(self, weight: Weight, span: Span) -> str:
        """Why moving a weight would change something else; ``""`` where it would not."""
        for other in self.weights:
            if other is not weight and _overlap(span, _span(other.value)):
                return f"tied to {other.name}: what is best for one is not for the other"
        for name, read in self.others:
            if _overlap(span, read):
                return f"{name} reads it too, in float"
        return ""


def _float_layers(model: nn.Module) -> Iterator[tuple[str, Span | None]]:
    for path, module in model.named_modules():
        looks_up = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if isinstance(module, PreparedOp) or not has_weights(module):
            continue
        if looks_up or not is_computed_inside(module):
            yield from ((path, _span(p)) for p in module.parameters(recurse=False))


def _float_calls(model: nn.Module) -> Iterator[tuple[str, Span | None]]:
    """Tensors that a graph reads otherwise than as the weight of a quantized layer."""
    for path, stage in stages(model).items():
        constant = constants(stage)
        for node in stage.graph.nodes:
            if node.op == "get_attr" and (reader := _float_reader(stage, node, constant)):
                value = constant_value(stage, node)
                if isinstance(value, torch.Tensor):
                    yield joined(path, reader.name), _span(value)


def _float_reader(stage: StageModule, node: fx.Node, constant: set[fx.Node]) -> fx.Node | None:
    for user in node.users:
        is_attribute = user.target is getattr and value_kind(user) == "other"  # a dtype, say
        if is_attribute or reads_metadata(user):
            continue
        if user in constant:
            found = _float_reader(stage, user, constant)
            if found is not None:
                return found
        elif not (isinstance(called_module(stage, user), PreparedLayer) and node in user.args[3:4]):
            return user
    return None
