"""Products of two computed tensors on indices, where the config asks for it (``products=8``)."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
from torch import fx

from ..config import ActivationSpec, QConfigMapping
from ..fake_quant import FakeQuantize
from ..graph import argument, called_module, called_name, free_name, value_kind
from ..nn import Attention, Contraction, PreparedAttention, PreparedProduct
from .annotate import LayerPlan
from .base import Pass
from .functional_layers import constants
from .functionalize import is_functional
from .index_ops import is_torch_call
from .normalize import LiveAttention
from .report import PassReport
from .residual import put_operator
from .stage import StageModule

_MATMULS = {"matmul": "other", "__matmul__": "other", "mm": "mat2", "bmm": "mat2"}
_ATTENTION = "scaled_dot_product_attention"


@dataclasses.dataclass(frozen=True)
class _Match:
    """A call that can run on indices: its operands, what it computes, what it reads in float."""

    operands: tuple[Any, ...]
    geometry: Contraction | Attention
    others: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class QuantizeProducts(Pass):
    """Turn matmul, einsum and attention of computed tensors into operators on two grids.

    Each operand has an α of its own. Products with parameters are layers already. Does nothing
    unless the mapping's global choice says ``ActivationSpec(products=…)``.
    """

    mapping: QConfigMapping

    name = "products"
    requires = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        chosen = self.mapping.global_config
        bits = chosen.activation.products if chosen and chosen.activation else None
        if bits is None:
            return
        spec = ActivationSpec(bits, kind="uniform")
        constant = constants(stage)
        for node in list(stage.graph.nodes):
            if node.meta.get("pinned") or node.meta.get("keep"):
                continue
            found = _match(stage, node)
            if isinstance(found, _Match):
                found = _why_not(found, constant) or found
            if isinstance(found, str):
                report.leave(node, found)
            elif found is not None:
                _replace(stage, node, found, spec)
                report.change(node, f"{called_name(node) or 'product'} on {spec.describe()}")


def _replace(stage: StageModule, node: fx.Node, match: _Match, spec: ActivationSpec) -> None:
    dtype, device = _float_type(stage)
    plan = LayerPlan(None, spec, apart=True)
    if isinstance(match.geometry, Attention):
        softmax = FakeQuantize.for_activation(spec, signed=False)
        attention = PreparedAttention(match.geometry, softmax, dtype).to(device)
        # Its dropout follows the flag of the module where it stands.
        live = match.geometry.live
        name = str(node.target) if live else free_name(stage, "apot_attention")
        put_operator(stage, node, name, attention, match.operands, plan)
    else:
        product = PreparedProduct(match.geometry, dtype).to(device)
        name = free_name(stage, "apot_product")
        put_operator(stage, node, name, product, match.operands, plan)
    node.kwargs = {key: value for key, value in match.others.items() if value is not None}


def _float_type(stage: StageModule) -> tuple[torch.dtype, torch.device]:
    """What the model computes in, as its parameters tell; float32 where it has none."""
    floats = (p for p in stage.parameters() if p.is_floating_point())
    first = next(floats, torch.empty(0))
    return first.dtype, first.device


def _why_not(match: _Match, constant: set[fx.Node]) -> str:
    """Why operands are none that can be quantized; ``""`` where they can be."""
    for operand in match.operands:
        if not isinstance(operand, fx.Node) or value_kind(operand) != "tensor":
            return "not both operands are tensors"
        if operand in constant:
            return "one operand is constant"
    return ""


def _match(stage: StageModule, node: fx.Node) -> _Match | str | None:
    """The product that a node computes, or why it stays float; None for any other node."""
    if isinstance(called_module(stage, node), LiveAttention):
        *operands, mask, dropout, causal = node.args
        return _attention(operands, {"mask": mask}, dropout, causal, live=True)
    name = called_name(node)
    if not is_torch_call(node, name):
        return None
    if name in _MATMULS:
        second = argument(node, 1, _MATMULS[name])
        if len(node.args) + len(node.kwargs) != 2 or "out" in node.kwargs:
            return "it has options beside its operands"
        call = "matmul" if name == "__matmul__" else name
        return _Match((argument(node, 0, "input"), second), Contraction(call))
    if name == "baddbmm":
        return _match_baddbmm(node)
    if name == "einsum":
        return _match_einsum(node)
    return _match_attention(node) if name == _ATTENTION else None


def _match_baddbmm(node: fx.Node) -> _Match | str:
    factors: list[Any] = [node.kwargs.get(key, 1) for key in ("alpha", "beta")]
    known = all(isinstance(factor, (int, float)) for factor in factors)
    if not known or "out" in node.kwargs or len(node.args) > 3:
        return "baddbmm with a traced alpha or beta, or an output of its own"
    operands = argument(node, 1, "batch1"), argument(node, 2, "batch2")
    alpha, beta = factors
    others = {"addend": argument(node, 0, "input") if beta else None}
    return _Match(operands, Contraction("baddbmm", alpha=alpha, beta=beta), others)


def _match_einsum(node: fx.Node) -> _Match | str | None:
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str) or node.kwargs:
        return "einsum without an equation in letters"
    if len(operands) != 2:
        return None if len(operands) == 1 else f"einsum of {len(operands)} operands"
    spelled = spell_out(equation)
    if spelled is None:
        return f"einsum {equation!r}: only plain letters, no ellipsis"
    return _Match(tuple(operands), Contraction("einsum", spelled))


def spell_out(equation: str) -> str | None:
    """A two-operand equation without spaces and with its output; None for one with an ellipsis.

    >>> spell_out("b i d, b j d")
    'bid,bjd->ij'
    """
    found = re.fullmatch(r"([A-Za-z]*),([A-Za-z]*)(?:->([A-Za-z]*))?", equation.replace(" ", ""))
    if found is None:
        return None
    first, second, output = found.groups()
    both = first + second
    if output is None:  # torch: every letter that comes once, in order of the alphabet
        output = "".join(sorted(letter for letter in set(both) if both.count(letter) == 1))
    return f"{first},{second}->{output}"


def _match_attention(node: fx.Node) -> _Match | str:
    keys = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    defaults = (None, None, None, None, 0.0, False)
    q, k, v, mask, dropout, causal = (
        argument(node, place, key, default)
        for place, (key, default) in enumerate(zip(keys, defaults, strict=True))
    )
    others = {"mask": mask, "scale": node.kwargs.get("scale")}
    return _attention([q, k, v], others, dropout, causal, node.kwargs.get("enable_gqa", False))


def _attention(
    operands: list[Any],
    others: dict[str, Any],
    dropout: Any,
    causal: Any,
    gqa: Any = False,
    live: bool = False,
) -> _Match | str:
    if any(isinstance(option, fx.Node) for option in (dropout, causal, gqa)):
        return "its dropout_p, is_causal or enable_gqa is traced"
    if causal and others["mask"] is not None:
        return "a mask beside is_causal, which torch refuses"
    options = Attention(float(dropout), bool(causal), bool(gqa), live)
    return _Match(tuple(operands), options, others)
