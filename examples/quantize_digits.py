"""Quantize-aware training of a small network on handwritten digits, from float to integers.

Run: python examples/quantize_digits.py (needs the extra `demo`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from sklearn.datasets import load_digits
from torch import nn

import apot_fx


def fit(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int, rate: float) -> None:
    """An ordinary loop: prepared models train like any other."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            loss = functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    train, test = slice(0, 1200), slice(1200, None)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    fit(model, x[train], y[train], epochs=10, rate=3e-3)

    prepared = apot_fx.prepare_apot(model, "w3a3")
    apot_fx.calibrate(prepared, x[train].split(128), progress=False)
    fit(prepared, x[train], y[train], epochs=3, rate=1e-3)
    converted = apot_fx.convert_apot(prepared)
    verdict = apot_fx.check_parity(prepared, converted, [x[test]])
    verdict.raise_if_failed()

    for name, stage in (("float", model), ("converted", converted)):
        with torch.no_grad():
            accuracy = (stage(x[test]).argmax(1) == y[test]).double().mean()
        print(f"{name}: {100 * float(accuracy):.1f} %")
    print(apot_fx.summary(converted))
    print(verdict)


if __name__ == "__main__":
    main()
