"""Batch norm that no layer takes in, on one grid: indices in, and out for quantized readers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..fake_quant import FakeQuantize
from .op import ConvertedOp, PreparedOp
from .quantize import Quantize


class PreparedNorm(PreparedOp):
    """Called as ``op(x, fake_quant, batch_norm)``; the module keeps its place, keys and mode."""

    kind = "batch norm"

    def forward(
        self, x: torch.Tensor, fake_quant: FakeQuantize | None, batch_norm: nn.Module
    ) -> torch.Tensor:
        return _normalise(batch_norm, x)


class ConvertedNorm(ConvertedOp):
    """The same of indices; children ``grid``, their quantizer, and ``norm`` in eval."""

    kind = "batch norm"

    def __init__(self, op: PreparedNorm, fake_quant: FakeQuantize, batch_norm: nn.Module) -> None:
        super().__init__()
        self.grid = Quantize(fake_quant.alpha, fake_quant.known_level_set())
        self.input_spec = self.grid.level_spec
        self.norm = copy.deepcopy(batch_norm).eval()

    def train(self, mode: bool = True) -> ConvertedNorm:
        """Converted models only evaluate."""
        super().train(mode)
        self.norm.eval()
        return self

    def compute(self, input: torch.Tensor, *args: Any, **operands: Any) -> torch.Tensor:
        return _normalise(self.norm, self.grid.dequantize(input))


def _normalise(batch_norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = batch_norm._parameters.get("weight")
    result: torch.Tensor = batch_norm(x if weight is None else x.to(weight.dtype))
    return result
