"""Embedding and EmbeddingBag: rows of a quantized table (contract 4.13).

What they read are row numbers, so nothing but the weight is quantized; both stages give
``fl(q · step)`` of the rows that a call looks up. Always standalone: called as torch's layer is.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
import torch.nn.functional as functional
from torch import nn

from .op import with_gradient_of
from .weighted import ConvertedWeighted, PreparedWeighted


@dataclasses.dataclass(frozen=True)
class Lookup:
    """What is made of the rows: themselves (``mode`` None), or a "sum", "mean" or "max" a bag."""

    mode: str | None = None
    include_last_offset: bool = False
    padding_idx: int | None = None  # a row that bags leave out

    @classmethod
    def of(cls, layer: nn.Embedding | nn.EmbeddingBag) -> Lookup:
        if isinstance(layer, nn.Embedding):
            return cls()
        return cls(layer.mode, layer.include_last_offset, layer.padding_idx)

    def __call__(
        self,
        rows: torch.Tensor,
        numbers: torch.Tensor,
        offsets: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        """``rows`` (N, D), found under ``numbers`` (N of them, of any shape)."""
        if self.mode is None:
            return rows.view(*numbers.shape, rows.shape[-1])
        # torch's own bags, over the rows instead of the table; the last row stands for padding.
        count = numbers.numel()
        table = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        places = torch.arange(count, device=numbers.device).view(numbers.shape)
        padding = None
        if self.padding_idx is not None:
            padding = count
            places = torch.where(numbers == self.padding_idx, count, places)
        return functional.embedding_bag(
            places.to(numbers.dtype),
            table,
            offsets,
            mode=self.mode,
            per_sample_weights=weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )


class _PreparedRows(PreparedWeighted):
    """Mixin of both. Only looked-up rows are quantized, so a call's cost is that of its rows."""

    standalone = True
    float_input: ClassVar[str] = "row numbers"

    def quantizes(self) -> bool:
        """Whether lookups are quantized now; an enabled observer sees the table first."""
        quant = self.weight_fake_quant
        if quant.observer_enabled:
            assert isinstance(self.weight, nn.Parameter)
            quant(self.weight.detach())
        return quant.quantizes and not self.read_at

    def quantized_rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rows (N, D) on their grid, with torch's own gradient for the table."""
        quant, (weight, _) = self.weight_fake_quant, self.operands(None, None)
        assert isinstance(self, (nn.Embedding, nn.EmbeddingBag))
        numbers = numbers.reshape(-1)
        rows = functional.embedding(
            numbers,
            weight,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
        if self.training:
            return quant.on_grid(rows, numbers).to(weight.dtype)
        exact = self._exact(rows.detach(), numbers).to(weight.dtype)
        if torch.is_grad_enabled() and weight.requires_grad:
            return with_gradient_of(exact, quant.on_grid(rows, numbers).to(weight.dtype))
        return exact

    @torch.no_grad()
    def _exact(self, rows: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """``fl(q · step)``, float32, as converted computes it."""
        quant = self.weight_fake_quant
        alpha = quant.clamped_alpha()
        where = (quant.level_spec, quant.axis, quant.group_size)
        alpha = alpha if quant.axis is None else alpha.index_select(0, numbers)
        index = torch.ops.apot_fx.quantize(rows, alpha, *where)
        values: torch.Tensor = torch.ops.apot_fx.dequantize(index, alpha, *where)
        return values


class PreparedEmbedding(_PreparedRows, nn.Embedding):  # type: ignore[misc]
    float_type = nn.Embedding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.quantizes():
            return nn.Embedding.forward(self, input)
        return Lookup.of(self)(self.quantized_rows(input), input, None, None)


class PreparedEmbeddingBag(_PreparedRows, nn.EmbeddingBag):  # type: ignore[misc]
    float_type = nn.EmbeddingBag

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not self.quantizes():
            return nn.EmbeddingBag.forward(self, input, offsets, per_sample_weights)
        rows = self.quantized_rows(input)
        return Lookup.of(self)(rows, input, offsets, per_sample_weights)


#: Which prepared layer stands for which torch layer; exact types only.
EMBEDDINGS: dict[type[nn.Module], type[_PreparedRows]] = {
    kind.float_type: kind for kind in (PreparedEmbedding, PreparedEmbeddingBag)
}


class ConvertedEmbedding(ConvertedWeighted):
    """An embedding (bag) on a packed table, child ``weight``; called as torch's layer is.

    Only the rows that a call looks up are unpacked.
    """

    standalone = True

    def __init__(self, layer: PreparedWeighted) -> None:
        weight, _ = layer.operands(None, None)
        super().__init__(layer, weight)
        assert isinstance(layer, (nn.Embedding, nn.EmbeddingBag))
        self.lookup = Lookup.of(layer)

    def compute(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        rows = self.weight.dequantize_rows(input.reshape(-1)).to(self.output_dtype)
        return self.lookup(rows, input, offsets, per_sample_weights)
