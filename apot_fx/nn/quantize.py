"""Quantizers of the converted stage: float in, indices out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..kernels import ALPHA_MAX, ALPHA_MIN
from ..levels import LevelSet
from ..tensor import check_alpha, keep_float32


class Quantize(nn.Module):
    """Float to indices: clamp to [low, high] (say, the relu before it), then quantize.

    Buffer ``alpha``, float32 scalar.
    """

    alpha: torch.Tensor

    def __init__(self, alpha: torch.Tensor, level_set: LevelSet) -> None:
        super().__init__()
        self.level_set = level_set
        self.level_spec = level_set.spec
        self.register_buffer("alpha", alpha.detach().float().clamp(ALPHA_MIN, ALPHA_MAX).clone())

    def forward(
        self, x: torch.Tensor, low: float | None = None, high: float | None = None
    ) -> torch.Tensor:
        if low is not None or high is not None:
            x = x.clamp(low, high)
        index: torch.Tensor = torch.ops.apot_fx.quantize(x, self.alpha, self.level_spec)
        return index

    def dequantize(self, index: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """``level · step`` of indices that this quantizer gave, computed in float32 or float64."""
        alpha = self.alpha.to(dtype)
        value: torch.Tensor = torch.ops.apot_fx.dequantize(index, alpha, self.level_spec)
        return value

    def check_state(self, state: Mapping[str, Any]) -> None:
        if "alpha" in state:
            check_alpha(state["alpha"], self.alpha.shape, within_limits=True)

    def _load_from_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        self.check_state(
            {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_float32(fn), recurse)

    def extra_repr(self) -> str:
        return str(self.level_set)


#: Who reads a layer's output: ``(quantizer, low, high)`` for indices, None for float.
Reader = tuple[Quantize, float | None, float | None] | None


def emit(y: torch.Tensor, readers: tuple[Reader, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """``y`` as each reader wants it.

    One reader (or none) gets a tensor, several a tuple in their order.
    """
    results = tuple(
        y if reader is None else reader[0](y, *reader[1:]) for reader in readers or (None,)
    )
    return results[0] if len(results) == 1 else results
