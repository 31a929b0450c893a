"""Small networks that tests of single parts share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import apot_fx
from apot_fx.passes.stage import StageModule


def seeded(build: Callable[[], nn.Module], shape: tuple[int, ...] | None = None) -> nn.Module:
    """A model with reproducible weights, batch norm statistics warmed by one batch, in eval."""
    torch.manual_seed(0)
    model = build()
    if shape is not None:
        model.train()
        model(torch.randn(8, *shape))
    return model.eval()


class Branches(nn.Module):
    """Batch norm, relu6, max pool, a cat of two branches, a residual add, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.right = nn.Conv2d(8, 8, 1)
        self.join = nn.Conv2d(16, 8, 3, padding=2, dilation=2)
        self.pool = nn.MaxPool2d(2)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(nn.functional.relu6(self.norm(self.stem(x))))
        both = torch.cat([self.left(x).relu(), self.right(x)], 1)
        x = torch.relu(self.join(both) + x)
        return self.head(self.dropout(x.mean((2, 3))))


class Mlp(nn.Module):
    """Three Linear layers, batch norm behind the first."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(12, width)
        self.norm = nn.BatchNorm1d(width)
        self.middle = nn.Linear(width, width, bias=False)
        self.last = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.relu(self.middle(x)))


def branches() -> tuple[nn.Module, list[torch.Tensor]]:
    """The network and two batches for it."""
    return seeded(Branches, (3, 8, 8)), [torch.randn(4, 3, 8, 8) for _ in range(2)]


def mlp() -> tuple[nn.Module, list[torch.Tensor]]:
    """The network and two batches for it."""
    return seeded(Mlp, (12,)), [torch.randn(6, 12) for _ in range(2)]


def calibrated(
    model: nn.Module, batches: list[torch.Tensor], config: object = "w4a4"
) -> StageModule:
    """Prepared and calibrated, in eval."""
    prepared = apot_fx.prepare_apot(model, config)
    apot_fx.calibrate(prepared, batches)
    return prepared.eval()
