"""``SoftWeight``: a weight between the levels below and above it, while that is being learned.

Source: Nagel et al., *Up or Down? Adaptive Rounding for Post-Training Quantization*, ICML 2020,
equations 22 to 24, with the neighbours in any level set in the place of floor and ceil.
"""

from __future__ import annotations

import torch
from torch import nn

from ..fake_quant import EXACT_UNIT, FakeQuantize
from .rounding import initial_logits, rectified_sigmoid


@torch.no_grad()
def neighbours(rows: torch.Tensor, quant: FakeQuantize) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the level at or below each weight, and whether there is one above to go to.

    A weight on a level, or beyond the ends, has nowhere to go: it stays at its nearest level.

    Args:
        rows: a weight of any float dtype with its output channel on axis 0.
        quant: its fake-quant, of one α, an α per channel or per group.

    Returns the index (int32) and a bool tensor, both of the weight's shape.
    """
    where = (quant.level_spec, quant.axis, quant.group_size)
    alpha, count = quant.clamped_alpha(), len(quant.known_level_set())
    nearest = torch.ops.apot_fx.quantize(rows, alpha, *where)
    value = torch.ops.apot_fx.dequantize(nearest, alpha, *where)
    below = nearest.int() - (value > rows).int()
    inside = (below >= 0) & (below < count - 1)
    return torch.where(inside, below, nearest.int()), inside & (value != rows)


class SoftWeight(nn.Module):
    """Takes the place of a layer's weight fake-quant; gives ``low + h(v) · (high − low)``.

    Attributes:
        logits: v, Parameter, float32, of the weight's shape as rows; h(v) starts at the place of
            the float weight between its neighbours.
        free: which elements have two neighbours to choose from.
    """

    observer_enabled = False
    quantizes = True
    #: No exact grid: layers then take their float form, which has gradients.
    unit = EXACT_UNIT + 1

    def __init__(self, rows: torch.Tensor, quant: FakeQuantize) -> None:
        super().__init__()
        self.__dict__["quant"] = quant  # no child: its keys and switches are the layer's
        index, self.free = neighbours(rows, quant)
        self.index = index
        self.low = self._values(index)
        self.gap = self._values(index + self.free.int()) - self.low
        place = torch.where(self.free, (rows - self.low) / self.gap, 0.0)
        self.logits = nn.Parameter(initial_logits(place.float().clamp(0, 1)))

    def _values(self, index: torch.Tensor) -> torch.Tensor:
        quant: FakeQuantize = self.__dict__["quant"]
        narrow = index.to(torch.uint8 if len(quant.known_level_set()) <= 256 else torch.int16)
        values: torch.Tensor = torch.ops.apot_fx.dequantize(
            narrow, quant.clamped_alpha(), quant.level_spec, quant.axis, quant.group_size
        )
        return values

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.low + self.gap * rectified_sigmoid(self.logits)

    @torch.no_grad()
    def up(self) -> torch.Tensor:
        """Which elements go to the level above; bool."""
        return self.free & (rectified_sigmoid(self.logits) >= 0.5)

    def committed(self, up: torch.Tensor) -> torch.Tensor:
        """Values of the chosen levels, float32, as rows."""
        return self._values(self.index + up.int())
