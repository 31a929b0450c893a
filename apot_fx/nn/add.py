"""The residual add of two quantized values on one grid (contract 4.9)."""

from __future__ import annotations

import torch

from ..fake_quant import FakeQuantize
from .op import ConvertedOp, PreparedOp
from .quantize import Quantize


class PreparedAdd(PreparedOp):
    """``fl(fl(q_a · step) + fl(q_b · step))``: in float just the sum of the two."""

    kind = "add"

    def forward(
        self,
        x: tuple[torch.Tensor, torch.Tensor],
        fake_quants: tuple[FakeQuantize | None, ...] = (None, None),
    ) -> torch.Tensor:
        return x[0] + x[1]


class ConvertedAdd(ConvertedOp):
    """The add of two index tensors; child ``grid`` is their common quantizer."""

    kind = "add"

    def __init__(
        self, op: PreparedAdd, fake_quants: tuple[FakeQuantize, ...], batch_norm: None
    ) -> None:
        super().__init__()
        common = fake_quants[0]
        self.grid = Quantize(common.alpha, common.known_level_set())
        self.input_spec = (self.grid.level_spec,) * 2

    def compute(self, x: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return self.grid.dequantize(x[0]) + self.grid.dequantize(x[1])
