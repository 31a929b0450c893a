"""Random models with recurrent, attention, 3-d, transposed, embedding and control-flow parts.

Every block maps (batch, time, width) to the same shape; blocks are nested at random, some inside of
modules that ``torch.fx`` can't follow.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

WIDTH = 8


class Recurrent(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        kind = draw.choice([nn.LSTM, nn.GRU, nn.RNN])
        both = draw.random() < 0.4
        self.cell = kind(WIDTH, WIDTH // 2 if both else WIDTH, batch_first=True, bidirectional=both)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.cell(x)
        return y + x


class Cells(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.cell = draw.choice([nn.GRUCell, nn.RNNCell])(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, states = torch.zeros_like(x[:, 0]), []
        for step in x.unbind(1):
            state = self.cell(step, state)
            states.append(state)
        return torch.stack(states, 1)


class Attention(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, dropout=0.1)
        self.norm = nn.LayerNorm(WIDTH)
        self.weights = draw.random() < 0.5
        self.causal = draw.random() < 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, mask = self.norm(x), None
        if self.causal:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y, _ = self.attention(y, y, y, need_weights=self.weights, attn_mask=mask)
        return x + y


class Encoder(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 16, batch_first=True, norm_first=draw.random() < 0.5, activation="gelu"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Functional(nn.Module):
    """Projections and products by hand."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 3)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.how = draw.choice(["sdpa", "matmul", "einsum", "bmm"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = functional.linear(x, self.qkv).chunk(3, -1)
        if self.how == "sdpa":
            return self.out(functional.scaled_dot_product_attention(q, k, v))
        if self.how == "matmul":
            return self.out(torch.softmax(q @ k.transpose(-2, -1), -1) @ v)
        if self.how == "bmm":
            return self.out(torch.bmm(torch.bmm(q, k.mT).softmax(-1), v))
        return self.out(torch.einsum("bts,bsd->btd", torch.einsum("btd,bsd->bts", q, k), v) / 9)


class Volume(nn.Module):
    """Through 3-d convolutions and a transposed one."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 4, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False)
        self.norm = nn.BatchNorm3d(4)
        self.up = nn.ConvTranspose3d(4, 1, (1, 2, 2), stride=(1, 2, 2))
        self.act = draw.choice([nn.ReLU(inplace=True), nn.GELU(), nn.Hardtanh()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.unflatten(-1, (2, 4)).unsqueeze(1)
        return self.up(self.act(self.norm(self.down(y)))).squeeze(1).flatten(2) + x


class Transposed(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        groups = draw.choice([1, 2])
        self.up = nn.ConvTranspose1d(WIDTH, WIDTH, 4, stride=2, padding=1, groups=groups)
        self.down = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.pool = draw.choice([nn.MaxPool1d(2), nn.AvgPool1d(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.up(x.transpose(1, 2)))
        return self.pool(self.down(y)).transpose(1, 2)


class Decides(nn.Module):
    """By its input's values, or how many there are, which of two blocks runs."""

    def __init__(self, draw: random.Random, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.one, self.two = make(), make()
        self.by_value = draw.random() < 0.5
        self.post = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(x) if x.shape[0] > 100 else x
        turns = 1 + int(self.by_value and x.mean().item() > -1e6)
        for _ in range(turns):
            x = torch.tanh(self.one(x))
        if float(x.abs().max()) < 1e6:
            x = self.two(x)
        return self.post(x)


class Remembers(nn.Module):
    def __init__(self, draw: random.Random, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body = make()
        self.key = draw.choice(["last", "seen"])

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        y = self.body(x)
        setattr(self, self.key, y.detach())
        return y * options.get("gain", 1.0)


class Gated(nn.Module):
    """Dense layers, in-place writes, a layer of two names, dropout."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.alias = self.value
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.gate(x).split(WIDTH, -1)
        a = a.clone()
        a[..., 0] = 0
        a.sigmoid_()
        return self.drop(self.value(a * b)) + self.alias(x).relu_()


PLAIN = (Recurrent, Cells, Attention, Encoder, Functional, Volume, Transposed, Gated)
NESTED = (Decides, Remembers)


class RandomModel(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        torch.manual_seed(seed)
        self.tokens = nn.Embedding(20, WIDTH) if draw.random() < 0.4 else None
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(self._block(draw, 2) for _ in range(draw.randint(2, 4)))
        self.head = nn.Linear(WIDTH, 3)
        self.root_decides = draw.random() < 0.25
        self.form = draw.choice(["tensor", "dict", "tuple"])

    def _block(self, draw: random.Random, depth: int) -> nn.Module:
        if depth and draw.random() < 0.3:
            return draw.choice(NESTED)(draw, lambda: self._block(draw, depth - 1))
        return draw.choice(PLAIN)(draw)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> Any:
        y = self.stem(self.tokens(x) if self.tokens is not None else x)
        if self.root_decides and y.sum() > 1e9:
            return y
        for block in self.blocks:
            y = functional.relu(block(y)) * scale
        y = self.head(y)
        return {"tensor": y, "dict": {"y": y, "n": 3}, "tuple": (y, [y + 1])}[self.form]

    def batch(self, size: int, time: int) -> torch.Tensor:
        if self.tokens is not None:
            return torch.randint(0, 20, (size, time))
        return torch.randn(size, time, WIDTH)
