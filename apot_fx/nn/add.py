"""The residual add of two quantized values on one grid (contract 4.9)."""

from __future__ import annotations

import torch

from ..fake_quant import FakeQuantize
from .op import ConvertedOp, PreparedOp
from .quantize import Quantize


class PreparedAdd(PreparedOp):
    """``fl(fl(q_a · step) + fl(q_b · step))``: in float just the sum of the two."""

    def forward(
        self, x: tuple[torch.Tensor, torch.Tensor], fake_quant: FakeQuantize | None = None
    ) -> torch.Tensor:
        return x[0] + x[1]


class ConvertedAdd(ConvertedOp):
    """The add of two index tensors; child ``grid`` is their common quantizer."""

    def __init__(self, op: PreparedAdd, fake_quant: FakeQuantize, batch_norm: None) -> None:
        super().__init__()
        self.grid = Quantize(fake_quant.alpha, fake_quant.known_level_set())
        self.input_spec = self.grid.level_spec

    def compute(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.grid.dequantize(x[0]) + self.grid.dequantize(x[1])
