"""Index ops that torch has no integer kernel for, run exactly on float32 of the index."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn


class ThroughFloat(nn.Module):
    """Calls a module, or the function of ``torch.nn.functional`` of that name, on float indices.

    Indices are below 2^15, so float32 holds them exactly, and the op only moves or compares them.
    """

    def __init__(self, call: nn.Module | str) -> None:
        super().__init__()
        self.call = call

    def forward(self, index: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        call = getattr(functional, self.call) if isinstance(self.call, str) else self.call
        moved: torch.Tensor = call(index.float(), *args, **kwargs)
        return moved.to(index.dtype)
