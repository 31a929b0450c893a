"""Seconds that prepare and convert take: linear in nodes, ResNet-50, 24 transformer layers.

Run alone (`python benchmarks/passes.py`) or by `make bench`. Prints a table and writes
`benchmarks/passes.json`. The A/A line is the smallest chain once more.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from zoo import declare_torchvision_operators

import apot_fx
from apot_fx.table import Table

COLUMNS = ("model", "nodes", "prepare s", "per 1,000 nodes", "convert s")


class Chain(nn.Module):
    """Residual blocks of a linear layer: three nodes each."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(x + 0.01 * layer(x))
        return x


def row(name: str, model: nn.Module, inputs: torch.Tensor, example: bool = False) -> dict[str, Any]:
    model.eval()
    start = time.perf_counter()
    prepared = apot_fx.prepare_apot(model, "w4a4", example_inputs=inputs if example else None)
    seconds = time.perf_counter() - start
    apot_fx.calibrate(prepared, [inputs], progress=False)
    start = time.perf_counter()
    apot_fx.convert_apot(prepared)
    convert = time.perf_counter() - start
    nodes = sum(node.op.startswith("call") for node in prepared.graph.nodes)
    each = f"{1000 * seconds / nodes:.2f}"
    values = (name, nodes, f"{seconds:.2f}", each, f"{convert:.2f}")
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    declare_torchvision_operators()
    from torchvision.models import resnet50

    small = torch.randn(2, 4)
    row("warm-up", Chain(10), small)
    rows = [row(f"chain of {count}", Chain(count), small) for count in (200, 500, 1000, 2000)]
    rows.append(row("chain of 200, A/A", Chain(200), small))
    image, text = torch.randn(1, 3, 224, 224), torch.randn(1, 16, 512)
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 24, enable_nested_tensor=False)
    for example in (False, True):
        note = ", example_inputs" if example else ""
        rows.append(row(f"ResNet-50{note}", resnet50(), image, example))
        rows.append(row(f"24 encoder layers{note}", encoder, text, example))
    print(Table(COLUMNS, rows, title="passes"))
    (Path(__file__).parent / "passes.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
