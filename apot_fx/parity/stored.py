"""Recompute what convert stores, from prepared, and compare tensors, attributes and the graph.

Running alone would miss much: one ULP in an α, or one bit of some weights, changes no output.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ..levels import LevelSet
from ..nn import (
    ConvertedAttention,
    ConvertedEmbedding,
    ConvertedLayer,
    ConvertedPairOp,
    ConvertedPool,
    ConvertedProduct,
    ConvertedRecurrent,
    Quantize,
)
from ..passes.stage import StageModule, info
from ..passes.tree import stages
from ..tensor import ApotTensor
from ..values import as_integers
from .verdict import Finding


def compare_stored(expected: nn.Module, found: nn.Module) -> Iterator[Finding]:
    """Findings for every stored tensor and setting, the level tables and the graphs."""
    for module in found.modules():
        if isinstance(module, ApotTensor):
            module.drop_cache()
    yield from _compare_tensors(expected, found)
    yield from _compare_settings(expected, found)
    graphs = stages(found)
    for path, stage in stages(expected).items():
        if path in graphs:
            yield _compare_graphs(path, stage, graphs[path])
        else:
            yield Finding(path, "graph", problem="missing in converted")
    for level_set in sorted(_level_sets(found), key=lambda s: s.spec):
        yield _check_tables(level_set)


def _tensors(stage: nn.Module) -> dict[str, torch.Tensor]:
    return dict(
        [
            *stage.named_parameters(remove_duplicate=False),
            *stage.named_buffers(remove_duplicate=False),
        ]
    )


def _compare_tensors(expected: nn.Module, found: nn.Module) -> Iterator[Finding]:
    wanted, given = _tensors(expected), _tensors(found)
    for name in [*wanted, *(extra for extra in given if extra not in wanted)]:
        finding = Finding(name, "stored tensor", _layer_of(name))
        if name not in given:
            finding.problem = "missing in converted"
        elif name not in wanted:
            finding.problem = "not made by convert"
        else:
            _compare_bits(finding, wanted[name].detach(), given[name].detach())
        yield finding


def _layer_of(name: str) -> str:
    for tail in (".weight.packed", ".weight.alpha", ".s", ".b"):
        if name.endswith(tail):
            return name.removesuffix(tail)
    return ""


def _compare_bits(finding: Finding, wanted: torch.Tensor, given: torch.Tensor) -> None:
    if wanted.shape != given.shape or wanted.dtype != given.dtype:
        finding.problem = (
            f"{tuple(given.shape)} {given.dtype}, expected {tuple(wanted.shape)} {wanted.dtype}"
        )
        return
    given = given.to(wanted.device)
    finding.values = wanted.numel()
    finding.differing = int((as_integers(wanted) != as_integers(given)).sum())
    if wanted.dtype == torch.float32 and finding.differing:
        finding.ulp = ulp_distance(wanted, given)


def ulp_distance(first: torch.Tensor, second: torch.Tensor) -> int:
    """Largest distance of two float32 tensors in units in the last place; NaN apart counts 2^32."""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(torch.int32).long()
        return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    distance = (ordered(first) - ordered(second)).abs()
    unequal_nan = first.isnan() != second.isnan()
    distance = torch.where(unequal_nan, torch.full_like(distance, 2**32), distance)
    return int(distance.max()) if distance.numel() else 0


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a converted module computes with beside its tensors."""
    keys: tuple[str, ...]
    if isinstance(module, ConvertedPool):
        keys = ("pool", "input_spec")
    elif isinstance(module, ConvertedProduct):
        keys = ("contraction", "input_spec", "input_levels", "output_dtype")
    elif isinstance(module, ConvertedAttention):
        keys = ("attention", "input_spec", "input_levels", "output_dtype")
    elif isinstance(module, ConvertedLayer):
        keys = ("kind", "product", "output_dtype", "input_spec", "input_levels", "wide")
    elif isinstance(module, ConvertedEmbedding):
        keys = ("kind", "lookup", "output_dtype")
    elif isinstance(module, ConvertedRecurrent):
        keys = ("recurrence", "output_dtype", "wide")
    elif isinstance(module, Quantize):
        keys = ("level_set", "level_spec")
    elif isinstance(module, ApotTensor):
        keys = ("level_set", "axis", "group_size", "shape")
    else:
        return {}
    return {key: getattr(module, key) for key in keys}


def _compare_settings(expected: nn.Module, found: nn.Module) -> Iterator[Finding]:
    modules = dict(found.named_modules())
    for name, module in expected.named_modules():
        wanted = _settings(module)
        if not wanted:
            continue
        finding = Finding(name, "settings")
        other = modules.get(name)
        given = {} if other is None else _settings(other)
        wrong = [key for key in wanted if key not in given or given[key] != wanted[key]]
        if wrong:
            key = wrong[0]
            finding.problem = f"{key} is {given.get(key)}, expected {wanted[key]}"
        yield finding


def _compare_graphs(path: str, expected: StageModule, found: StageModule) -> Finding:
    """Same calls on the same sources in the same order; names are display only."""
    wanted, given = _calls(expected), _calls(found)
    finding = Finding(path or "graph", "graph", values=len(wanted))
    for (node, mine), (other, theirs) in zip(wanted, given, strict=False):
        if mine != theirs:
            finding.where, finding.layer = other.name, info(other).layer
            finding.problem = f"graph differs from what convert makes of prepared at {node.name}"
            return finding
    if len(wanted) != len(given):
        finding.problem = f"{len(given)} calls, expected {len(wanted)}"
    return finding


def _calls(stage: StageModule) -> list[tuple[fx.Node, tuple[Any, ...]]]:
    """Every node but get_attr with what it calls; sources are positions, attributes names."""
    nodes = [node for node in stage.graph.nodes if node.op != "get_attr"]
    position: dict[fx.Node, Any] = {node: number for number, node in enumerate(nodes)}
    position.update({n: f"attribute {n.target}" for n in stage.graph.nodes if n.op == "get_attr"})
    return [
        (
            node,
            (
                node.op,
                node.target,
                fx.map_arg(node.args, position.__getitem__),
                fx.map_arg(dict(node.kwargs), position.__getitem__),
                info(node).id,
                info(node).quantizer,
            ),
        )
        for node in nodes
    ]


def _level_sets(stage: nn.Module) -> set[LevelSet]:
    found: set[LevelSet] = set()
    for module in stage.modules():
        if isinstance(module, (Quantize, ApotTensor)):
            found.add(module.level_set)
        elif isinstance(module, ConvertedLayer) and module.input_levels is not None:
            found.add(module.input_levels)
        elif isinstance(module, ConvertedPairOp):
            found.update(module.input_levels)
    return found


def _check_tables(level_set: LevelSet) -> Finding:
    """The kernels' lookup tables against the level set, at every half-unit (α = 2M makes r 1)."""
    finding = Finding(level_set.spec, "level table")
    half = torch.arange(2 * level_set.q_min - 1, 2 * level_set.q_max + 2)
    alpha = torch.tensor(2.0 * level_set.unit)
    given = torch.ops.apot_fx.quantize(half.float(), alpha, level_set.spec)
    wanted = [bisect.bisect_left(level_set.thresholds, t) for t in half.tolist()]
    levels = torch.ops.apot_fx.levels(torch.arange(len(level_set)).to(given.dtype), level_set.spec)
    finding.values = len(half) + len(level_set)
    finding.differing = int((given.long() != torch.tensor(wanted)).sum())
    finding.differing += int((levels != torch.tensor(level_set.levels).float()).sum())
    return finding
