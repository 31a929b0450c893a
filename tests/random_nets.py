"""Random convolutional, branching, shared, grouped, dilated and fully connected networks."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn


class RandomNet(nn.Module):
    """A stack of random blocks on small images (or sequences), chosen by ``seed``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.rank = draw.choice([1, 2, 2])
        self.conv = nn.Conv1d if self.rank == 1 else nn.Conv2d
        self.norm = nn.BatchNorm1d if self.rank == 1 else nn.BatchNorm2d
        self.width = draw.choice([4, 6, 8])
        self.layers = nn.ModuleList()
        self.steps: list[tuple[str, tuple[int, ...], Any]] = []
        self._add("plain", [self.conv(3, self.width, 3, padding=1)])
        kinds = [name.removeprefix("_do_") for name in dir(self) if name.startswith("_do_")]
        for _ in range(draw.randint(4, 9)):
            kind = draw.choice(kinds)
            self._add(kind, self._parts(kind, draw), draw.random())
        self.head = nn.Linear(self.width, 5)
        self.second = nn.Linear(self.width, 3) if draw.random() < 0.3 else None

    def _add(self, kind: str, parts: list[nn.Module], option: float = 0.0) -> None:
        places = range(len(self.layers), len(self.layers) + len(parts))
        self.layers.extend(parts)
        self.steps.append((kind, tuple(places), option))

    def _parts(self, kind: str, draw: random.Random) -> list[nn.Module]:
        c = self.width
        bias = draw.random() < 0.5

        def conv(inputs: int = c, outputs: int = c, **options: Any) -> nn.Module:
            return self.conv(inputs, outputs, 3, padding=1, bias=bias, **options)

        if kind in ("plain", "residual", "inplace", "shared", "both", "poolrelu"):
            return [conv()]
        if kind == "normed":
            affine = draw.random() < 0.8
            return [conv(dilation=1), self.norm(c, affine=affine)]
        if kind == "depthwise":
            return [conv(groups=c), self.norm(c), self.conv(c, c, 1, bias=False), self.norm(c)]
        if kind == "dilated":
            modes = ["zeros", "reflect", "circular", "replicate"]
            mode = draw.choice(modes)
            return [self.conv(c, c, 3, padding=2, dilation=2, groups=2, padding_mode=mode)]
        if kind == "same":
            return [self.conv(c, c, 4, padding="same")]
        if kind == "cat":
            return [conv(), conv(), self.conv(2 * c, c, 1)]
        if kind == "squeeze":
            return [nn.Linear(c, c), nn.Linear(c, c)]
        if kind == "dropout":
            return [nn.Dropout(0.3)]
        if kind == "activation":
            return [draw.choice([nn.ReLU6(), nn.Hardtanh(-0.4, 0.9), nn.GELU(), nn.ReLU(True)])]
        return []

    def forward(self, x: torch.Tensor) -> Any:
        for kind, places, option in self.steps:
            parts = [self.layers[place] for place in places]
            x = getattr(self, f"_do_{kind}")(x, parts, option)
        pooled = x.mean(tuple(range(2, 2 + self.rank)))
        out = self.head(pooled)
        return out if self.second is None else {"main": out, "second": self.second(pooled)}

    def _do_plain(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        return parts[0](x)

    def _do_normed(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        return functional.relu(parts[1](parts[0](x)))

    def _do_depthwise(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        x = functional.relu6(parts[1](parts[0](x)))
        return parts[3](parts[2](x))

    def _do_dilated(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        return parts[0](x)

    def _do_same(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        return parts[0](x)

    def _do_residual(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        return torch.relu(parts[0](x) + x)

    def _do_inplace(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        out = parts[0](x)
        out += x
        view = out.flatten(2) if option > 1 else out.view(out.size(0), out.size(1), -1)
        view.relu_()
        return out

    def _do_shared(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        return parts[0](functional.relu(parts[0](x)))

    def _do_both(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        y = parts[0](x)
        return functional.relu(y) + y

    def _do_cat(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        left = functional.relu(parts[0](x)) if option < 0.5 else parts[0](x)
        return parts[2](torch.cat([left, parts[1](x)], 1))

    def _do_squeeze(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        gate = functional.relu(parts[0](x.flatten(2).mean(2)))
        return x * torch.sigmoid(parts[1](gate)).reshape(x.shape[0], -1, *[1] * self.rank)

    def _do_dropout(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        if option < 0.5:
            return functional.dropout(x, 0.2, self.training)
        return parts[0](x)

    def _do_activation(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        return parts[0](x * 1.0)

    def _do_pool(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        pool = (functional.max_pool1d, functional.max_pool2d)[self.rank - 1]
        return pool(x, 3, 1, 1)

    def _do_poolrelu(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        pool = (functional.max_pool1d, functional.max_pool2d)[self.rank - 1]
        return functional.relu(pool(parts[0](x), 3, 1, 1))

    def _do_average(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        pool = (functional.avg_pool1d, functional.avg_pool2d)[self.rank - 1]
        return pool(x, 3, 1, 1, False, option < 0.5)

    def _do_swap(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([second, first], 1)

    def _do_shift(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        edge = [1] * (2 * self.rank)
        return functional.pad(x.flip(-1), edge) if option < 0.5 else x.clamp(min=0.05)

    def _do_resize(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        pool = (functional.max_pool1d, functional.max_pool2d)[self.rank - 1]
        return functional.interpolate(pool(x, 2), scale_factor=2)

    def _do_reshape(self, x: torch.Tensor, parts: Any, option: float) -> torch.Tensor:
        return x.reshape(x.size(0), x.shape[1], -1).reshape(x.shape)


class RandomMlp(nn.Module):
    """Linear layers with batch norm, dropout, skips and shared weights, chosen by ``seed``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.width = draw.choice([8, 12, 17])
        self.first = nn.Linear(10, self.width)
        self.blocks = nn.ModuleList()
        for _ in range(draw.randint(1, 4)):
            layer = nn.Linear(self.width, self.width, bias=draw.random() < 0.5)
            norm = nn.BatchNorm1d(self.width) if draw.random() < 0.5 else nn.Identity()
            self.blocks.append(nn.ModuleDict({"layer": layer, "norm": norm}))
        self.kinds = [draw.choice(["relu", "skip", "twice", "gelu"]) for _ in self.blocks]
        self.last = nn.Linear(self.width, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = functional.relu(self.first(x)) * scale
        for kind, block in zip(self.kinds, self.blocks, strict=True):
            y = block["norm"](block["layer"](x))
            if kind == "gelu":
                x = functional.gelu(y)
            elif kind == "skip":
                y += x
                x = functional.relu(y, inplace=True)
            elif kind == "twice":
                x = functional.relu(block["layer"](functional.relu(y)))
            else:
                x = y.relu()
        return self.last(functional.dropout(x, 0.1, self.training))


def random_net(seed: int) -> tuple[nn.Module, list[torch.Tensor]]:
    """A network in eval with warmed batch norm, and two batches for it."""
    torch.manual_seed(seed)
    if seed % 4 == 3:
        model: nn.Module = RandomMlp(seed)
        batches = [torch.randn(5, 10) for _ in range(2)]
    else:
        model = RandomNet(seed)
        shape = (3, 12) if model.rank == 1 else (3, 8, 8)
        batches = [torch.randn(4, *shape) for _ in range(2)]
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(batch + 0.1)
    return model.eval(), batches
