"""What a graph must look like at each stage; broken rules raise GrammarError with the node."""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import fx

from ..errors import GrammarError
from ..fake_quant import FakeQuantize
from ..graph import called_module, source
from ..nn import ConvertedOp, PreparedOp, Quantize
from .index_ops import bounds, index_op
from .stage import StageModule, as_tuple, grids_of, info, inputs_of


def is_prepared(stage: StageModule) -> None:
    """Every quantized call reads its own fake-quant through index ops; ids are unique."""
    _ids_are_unique(stage)
    for node in stage.graph.nodes:
        layer = called_module(stage, node)
        if not isinstance(layer, PreparedOp) or layer.standalone:
            continue
        for value, module in grids_of(node):
            if module is None:
                continue
            for origin in _sources(stage, value):
                if origin.op != "call_module" or origin.target != module.target:
                    where = f"{node.name}: reads {origin.name}"
                    raise GrammarError(f"{where}, which is not on the grid of {module.target}")


def is_hoisted(stage: StageModule) -> None:
    """No fake-quant reads what an index op made (dropout and max pools with other readers
    excepted)."""
    is_prepared(stage)
    for node in stage.graph.nodes:
        if isinstance(called_module(stage, node), FakeQuantize):
            match = index_op(stage, source(node))
            if match is not None and match.kind not in ("dropout", "max"):
                raise GrammarError(f"{node.name}: stands below the index op {source(node).name}")


def is_converted(stage: StageModule) -> None:
    """Only indices flow between quantized layers that index ops join, and no fake-quant is left."""
    _ids_are_unique(stage)
    for name, module in stage.named_modules():
        if isinstance(module, (FakeQuantize, PreparedOp)):
            raise GrammarError(f"{name}: {type(module).__name__} is left after convert")
    for node in stage.graph.nodes:
        module = called_module(stage, node)
        if isinstance(module, ConvertedOp) and not module.standalone:
            for value, spec in zip(inputs_of(node), as_tuple(module.input_spec), strict=True):
                for origin in _sources(stage, value) if spec else ():
                    if not info(origin).quantizer:
                        raise GrammarError(f"{node.name}: reads {origin.name}, which is no index")
        if isinstance(module, Quantize):
            _reads_true_float(stage, node)


def _reads_true_float(stage: StageModule, node: fx.Node) -> None:
    """A quantizer of its own must stand behind a float op, never behind a quantized layer.

    A max pool with other readers is a float op."""
    pending = [(source(node), True, False)]
    while pending:
        value, zero_survives, is_shared = pending.pop()
        is_shared = is_shared or len(value.users) > 1
        layer = source(value) if value.target is operator.getitem else value
        producer = called_module(stage, layer)
        if isinstance(producer, ConvertedOp) and not producer.standalone:
            raise GrammarError(f"{node.name}: quantizes what {layer.name} gives in float")
        match, limits = index_op(stage, value), bounds(stage, value)
        if limits is not None:
            zero_survives = zero_survives and limits[0] <= 0 <= limits[1]
            pending.append((source(value), zero_survives, is_shared))
        elif match is None or (match.kind == "max" and is_shared):
            continue
        elif zero_survives or match.kind != "zero_pad":
            pending.extend((inner, zero_survives, is_shared) for inner in match.inputs)


def _sources(stage: StageModule, node: fx.Node) -> Iterator[fx.Node]:
    """Where a value comes from, through index ops."""
    match = index_op(stage, node) if not isinstance(called_module(stage, node), Quantize) else None
    if match is None:
        yield node
        return
    for inner in match.inputs:
        yield from _sources(stage, inner)


def _ids_are_unique(stage: StageModule) -> None:
    seen: dict[int, str] = {}
    for node in stage.graph.nodes:
        number = info(node).id
        if number is None:
            continue
        if number in seen:
            raise GrammarError(f"{node.name}: provenance {number} is {seen[number]}'s already")
        seen[number] = node.name
