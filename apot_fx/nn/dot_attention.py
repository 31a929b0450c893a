"""Scaled dot-product attention: both its products on levels, the softmax between them in float."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as functional

from ..fake_quant import FakeQuantize
from .contraction import Contraction, ConvertedPairOp, PreparedPairOp, multiply
from .quantize import Quantize

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_PRODUCT = Contraction("matmul")


@dataclasses.dataclass(frozen=True)
class Attention:
    """The options of a call of ``scaled_dot_product_attention`` that are no tensors.

    ``live``: the dropout follows a training flag; torch's own function always drops.
    """

    dropout: float = 0.0
    causal: bool = False
    gqa: bool = False
    live: bool = False

    def plain(
        self, x: Three, mask: torch.Tensor | None, scale: float | None, training: bool
    ) -> torch.Tensor:
        """What torch computes."""
        dropout = self.dropout if training or not self.live else 0.0
        return functional.scaled_dot_product_attention(
            *x, mask, dropout, self.causal, scale=scale, enable_gqa=self.gqa
        )

    def heads(self, q: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
        """Keys or values with one head for each of q's, where heads are shared."""
        if not self.gqa:
            return list(others)
        return [x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in others]

    def softmax(
        self, scores: torch.Tensor, width: int, mask: torch.Tensor | None, scale: float | None
    ) -> torch.Tensor:
        """``softmax(fl(scores · scale) + mask)``; 0 in rows whose every place is masked.

        ``width``: of q and k, which gives the scale where none is given.
        """
        scores = scores * (1 / math.sqrt(width) if scale is None else scale)
        if self.causal:
            visible = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~visible, -math.inf)
        if mask is None:
            return scores.softmax(-1)
        hides = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if hides else scores + mask
        # Torch gives zeros there, not NaN; filled before as well, or the gradient would be NaN.
        nothing = (scores == -math.inf).all(-1, keepdim=True)
        return scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def _laid_out(y: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """``y`` with q's order of axes, as torch's fused kernel gives it: users view it flat."""
    if q.dim() != 4 or q.shape != y.shape or q.stride(-1) != 1:
        return y
    out = torch.empty_like(q, dtype=y.dtype)
    return y if y.stride() == out.stride() else out.copy_(y)


class PreparedAttention(PreparedPairOp):
    """Called as ``op((q, k, v), (fake-quant of each), mask=…, scale=…)``.

    Child ``activation_post_process`` is the fake-quant of the softmax, which lies inside. With
    nothing quantizing it is torch's own call, bit for bit; else dropout acts in train alone.
    """

    kind = "attention"
    activation_post_process: FakeQuantize

    def __init__(
        self, attention: Attention, softmax: FakeQuantize, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(dtype)
        self.attention = attention
        self.activation_post_process = softmax

    def forward(
        self,
        x: Three,
        fake_quants: tuple[FakeQuantize | None, ...] = (None, None, None),
        mask: torch.Tensor | None = None,
        scale: float | None = None,
    ) -> torch.Tensor:
        own = self.activation_post_process
        if not any(quant is not None and quant.quantizes for quant in (*fake_quants, own)):
            if own.observer_enabled:
                with torch.no_grad():
                    own(self._softmax(x, fake_quants, mask, scale))
            return self.attention.plain(x, mask, scale, self.training)
        weights = own(self._softmax(x, fake_quants, mask, scale))
        if self.attention.dropout and self.training:
            weights = functional.dropout(weights, self.attention.dropout)
        (v,) = self.attention.heads(x[0], x[2])
        y = multiply(_PRODUCT, (weights, v), (own, fake_quants[2]), exact=not self.training)
        return self.rounded(_laid_out(y, x[0]), (own, *fake_quants))

    def _softmax(
        self,
        x: Three,
        quants: tuple[FakeQuantize | None, ...],
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        q, k = x[0], *self.attention.heads(x[0], x[1])
        pair = q, k.transpose(-2, -1)
        scores = multiply(_PRODUCT, pair, quants[:2], exact=not self.training)
        return self.attention.softmax(scores, q.shape[-1], mask, scale)

    def extra_repr(self) -> str:
        return str(self.attention)


class ConvertedAttention(ConvertedPairOp):
    """The same on indices.

    Child ``quantize`` puts the softmax on its grid; ``s`` is (2,): of the scores, of the result.
    """

    kind = "attention"

    def __init__(
        self, op: PreparedAttention, fake_quants: tuple[FakeQuantize, ...], batch_norm: None
    ) -> None:
        q, k, v = (quant.step() for quant in fake_quants)
        own = op.activation_post_process
        super().__init__(op, fake_quants, torch.stack([q * k, own.step() * v]))
        self.attention = op.attention
        self.quantize = Quantize(own.alpha, own.known_level_set())

    def compute(
        self, x: Three, mask: torch.Tensor | None = None, scale: float | None = None
    ) -> torch.Tensor:
        units = [level_set.unit for level_set in self.input_levels]
        q, k, v = self.levels(x)
        k, v = self.attention.heads(q, k, v)
        scores = _PRODUCT.exact(q, k.transpose(-2, -1), self.s[0], units[0] * units[1])
        index = self.quantize(self.attention.softmax(scores, q.shape[-1], mask, scale))
        weights = torch.ops.apot_fx.levels(index, self.quantize.level_spec)
        y = _PRODUCT.exact(weights, v, self.s[1], self.quantize.level_set.unit * units[2])
        return _laid_out(y, x[0]).to(self.output_dtype)

    def extra_repr(self) -> str:
        return f"{self.attention}, {' x '.join(map(str, self.input_levels))}"
