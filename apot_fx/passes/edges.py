"""Layer-to-layer edges of a graph, and which of them are carried as indices.

An edge joins two of convolution, linear, pool, add and cat that have only batch norm, clamps and
index ops between them. It is carried as indices where the model, once converted, has no float
tensor on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from ..fake_quant import FakeQuantize
from ..graph import called_module, called_name
from ..nn import (
    EMBEDDINGS,
    ConvertedEmbedding,
    ConvertedNorm,
    ConvertedOp,
    FunctionalLayer,
    PreparedNorm,
    PreparedOp,
    Quantize,
    is_standalone_type,
)
from ..nn.fold import BATCH_NORMS
from .index_ops import JOINS, bounds, index_op, is_torch_call
from .residual import is_add, pool_of
from .stage import StageModule, info, inputs_of


def index_edges(stage: StageModule) -> tuple[int, int]:
    """How many edges are carried as indices, and how many there are."""
    found = [carried for node in stage.graph.nodes for carried in _edges_into(stage, node)]
    return sum(found), len(found)


def _edges_into(stage: StageModule, node: fx.Node) -> Iterator[bool]:
    if not _is_end(stage, node):
        return
    for value in _operands(node):
        yield from _edges_from(stage, value)


def _operands(node: fx.Node) -> tuple[fx.Node, ...]:
    """The values that an end computes from: both of an add, all of a cat, a layer's first."""
    if node.op == "call_module" or called_name(node) in JOINS:
        return inputs_of(node)
    first_two = node.args[:2] if is_add(node) else node.args[:1]
    return tuple(value for value in first_two if isinstance(value, fx.Node))


def _edges_from(stage: StageModule, value: fx.Node) -> Iterator[bool]:
    """Edges that end where ``value`` is read: from each end above it."""
    pending, seen = [(value, True, False)], set()
    while pending:
        current, carried, on_grid = pending.pop()
        if (current, carried, on_grid) in seen:
            continue
        seen.add((current, carried, on_grid))
        module = called_module(stage, current)
        on_grid = on_grid or bool(info(current).quantizer)
        if isinstance(module, (FakeQuantize, Quantize)):
            pending.append((_first(current), carried, True))
        elif isinstance(module, (PreparedNorm, ConvertedNorm)):  # indices in, indices out
            pending.append((_first(current), carried and on_grid, on_grid))
        elif current.target is operator.getitem and isinstance(
            source := called_module(stage, _first(current)), ConvertedOp
        ):
            if isinstance(source, ConvertedNorm):
                pending.append((_first(current), carried, bool(info(current).quantizer)))
            else:
                yield carried and bool(info(current).quantizer)
        elif _is_end(stage, current):
            computes = isinstance(module, (PreparedOp, ConvertedOp)) and not module.standalone
            yield carried and on_grid and (computes or called_name(current) in JOINS)
        elif isinstance(module, BATCH_NORMS):
            pending.append((_first(current), False, on_grid))
        elif bounds(stage, current) is not None:
            pending.append((_first(current), carried, on_grid))
        else:
            match = index_op(stage, current)
            if match is not None:
                pending.extend((source, carried, on_grid) for source in match.inputs)


def _first(node: fx.Node) -> fx.Node:
    (first, *_) = inputs_of(node)
    return first


def _is_end(stage: StageModule, node: fx.Node) -> bool:
    module = called_module(stage, node)
    if isinstance(module, (PreparedNorm, ConvertedNorm)):
        return False
    if module is not None:
        if isinstance(module, (*EMBEDDINGS, ConvertedEmbedding)):
            return False  # nothing is multiplied
        ours = isinstance(module, (PreparedOp, ConvertedOp, FunctionalLayer))
        return ours or is_standalone_type(type(module)) or pool_of(stage, node) is not None
    name = called_name(node)
    if not is_torch_call(node, name):
        return False
    return name in JOINS or is_add(node) or pool_of(stage, node) is not None
