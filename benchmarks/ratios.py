"""Ratios of medians in one run: fake-quant, packing, prepared and converted against their peers.

Run alone (`python benchmarks/ratios.py`) or by `make bench`. Prints a table and writes
`benchmarks/ratios.json`. The A/A line is the same thing timed twice: differences below it mean
nothing. Timings are no test's verdict.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import apot_fx
from apot_fx import LevelSet
from apot_fx.demo.models import ResidualNet
from apot_fx.table import Table

COLUMNS = ("what", "ms", "against", "ratio")


def medians(*calls: Callable[[], object], rounds: int = 15) -> list[float]:
    """Median milliseconds of each call, interleaved so that drift hits all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds + 2):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call()
            if turn >= 2:
                times[place].append(1e3 * (time.perf_counter() - start))
    return [statistics.median(t) for t in times]


def row(what: str, ms: float, against: str, base: float) -> dict[str, object]:
    return {"what": what, "ms": f"{ms:.3f}", "against": against, "ratio": f"{ms / base:.2f}"}


def kernels() -> list[dict[str, object]]:
    """4M values: fake-quant forward, and with gradients, against clone and torch's uniform."""
    x, alpha, levels = torch.randn(4_000_000), torch.tensor(2.0), LevelSet.apot(4)
    leaf, clip = x.clone().requires_grad_(), alpha.clone().requires_grad_()
    index = apot_fx.quantize(x, 2.0, levels)
    scale, zero = torch.tensor([0.1], requires_grad=True), torch.tensor([0.0], requires_grad=True)

    def learn() -> None:
        apot_fx.fake_quantize(leaf, clip, levels, grad="rcf").sum().backward()

    def learn_torch() -> None:
        op = torch._fake_quantize_learnable_per_tensor_affine
        op(leaf, scale, zero, -8, 7, 1.0).sum().backward()

    names = ["clone again (A/A)", "quantize", "fake-quant", "fake-quant and gradients (RCF)",
             "torch's uniform fake-quant", "torch's learnable uniform and gradients",
             "pack to 4 bits"]  # fmt: skip
    base, *found = medians(
        x.clone, x.clone,
        lambda: apot_fx.quantize(x, alpha, levels),
        lambda: apot_fx.fake_quantize(x, alpha, levels),
        learn,
        lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7),
        learn_torch,
        lambda: apot_fx.pack(index, 4),
    )  # fmt: skip
    return [row(name, ms, "clone", base) for name, ms in zip(names, found, strict=True)]


def networks() -> list[dict[str, object]]:
    """A small residual network, batch 8: training step and inference against float."""
    torch.manual_seed(0)
    model, x = ResidualNet(32).eval(), torch.randn(8, 1, 32, 32)
    prepared = apot_fx.prepare_apot(model)
    apot_fx.calibrate(prepared, [x], progress=False)
    converted = apot_fx.convert_apot(prepared)
    with torch.no_grad():
        base, *found = medians(
            lambda: model(x), lambda: model(x), lambda: prepared(x), lambda: converted(x)
        )
    names = ["float again (A/A)", "prepared, eval", "converted, reference backend"]
    rows = [row(n, ms, "float, eval", base) for n, ms in zip(names, found, strict=True)]
    step = [stage.train() for stage in (ResidualNet(32), prepared)]
    base, qat = medians(*(lambda m=m: m(x).sum().backward() for m in step))
    return [*rows, row("prepared, training step", qat, "float training step", base)]


def main() -> None:
    note = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table(COLUMNS, kernels() + networks(), title="ratios of medians", notes=[note])
    print(table)
    Path(__file__).with_suffix(".json").write_text(table.to_json() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
