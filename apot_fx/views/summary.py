"""``summary``: bits and bytes of every layer of a stage."""

from __future__ import annotations

import torch
from torch import nn

from ..nn import (
    ConvertedLayer,
    ConvertedPairOp,
    ConvertedWeighted,
    PreparedLayer,
    PreparedPairOp,
    PreparedWeighted,
)
from ..passes.tree import stage_info
from ..table import Table

_COLUMNS = ("layer", "kind", "weight", "levels", "bits", "bytes", "float32 bytes", "input")


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and persistent buffers, shared storage counted once."""
    seen: dict[int, int] = {}
    for tensor in model.state_dict().values():
        if isinstance(tensor, torch.Tensor):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr() or id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def summary(stage: nn.Module) -> Table:
    """Rows of every quantized layer; the notes give the whole model's bytes."""
    known = stage_info(stage)
    assert known is not None
    rows: list[dict[str, object]] = []
    packed = floats = 0
    seen: set[int] = set()
    for name, layer in stage.named_modules():
        if isinstance(layer, (PreparedPairOp, ConvertedPairOp)):
            rows.append(_pair_row(name, layer))
        if not isinstance(layer, (PreparedWeighted, ConvertedWeighted)):
            continue
        row = _row(name, layer)
        rows.append(row)
        converted = isinstance(layer, ConvertedWeighted)
        stored = layer.weight if converted else layer.weight_fake_quant
        if id(stored) not in seen:
            seen.add(id(stored))
            packed += int(str(row["bytes"]))
            floats += int(str(row["float32 bytes"]))
    notes = [f"state_dict of the {known.kind} model: {stored_bytes(stage):,} bytes"]
    if packed:
        notes.append(f"quantized weights: {packed:,} bytes, {floats / packed:.2f}x below float32")
    return Table(_COLUMNS, rows, title=f"{known.origin.__name__}: {known.kind}", notes=notes)


def _pair_row(name: str, op: PreparedPairOp | ConvertedPairOp) -> dict[str, object]:
    """A product of activations: it stores nothing but its scales."""
    inputs, stored = "see explain", 0
    if isinstance(op, ConvertedPairOp):
        inputs, stored = " x ".join(map(str, op.input_levels)), 4 * op.s.numel()
    return dict(zip(_COLUMNS, (name, op.kind, "", "", "", stored, 0, inputs), strict=True))


def _row(name: str, layer: PreparedWeighted | ConvertedWeighted) -> dict[str, object]:
    if isinstance(layer, ConvertedWeighted):
        level_set, alpha = layer.weight.level_set, layer.weight.alpha
        inputs = str(layer.input_levels or layer.float_input)
        own = layer.s.numel() + layer.b.numel() if isinstance(layer, ConvertedLayer) else 0
    else:
        level_set, alpha = layer.weight_fake_quant.known_level_set(), layer.weight_fake_quant.alpha
        inputs = "see explain"
        own = 0
        if isinstance(layer, PreparedLayer):
            own = max(layer.channels, alpha.numel()) + layer.channels
    kind, scales, count = layer.kind, alpha.numel() + own, layer.weight_shape.numel()
    values = (
        name,
        kind,
        "x".join(map(str, layer.weight_shape)),
        str(level_set),
        level_set.bits,
        -(-count * level_set.bits // 8) + 4 * scales,
        4 * count,
        inputs,
    )
    return dict(zip(_COLUMNS, values, strict=True))
