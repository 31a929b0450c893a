"""The quantizer's kernels by size, against a copy and against torch's uniform operators.

Run alone (`python benchmarks/kernels.py`) or by `make bench`. Ratios of medians in one run; the A/A
column is clone against itself. Writes `benchmarks/kernels.json`. `OMP_WAIT_POLICY=passive`, or one
thread, where other work runs on the machine: a spinning thread that waits for a core costs
milliseconds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from ratios import medians

from apot_fx import ActivationSpec, LevelSet
from apot_fx.fake_quant import FakeQuantize
from apot_fx.kernels import eager, status
from apot_fx.table import Table

SIZES = tuple(2**power for power in (10, 14, 18, 20, 22, 24, 26))
LEVELS = LevelSet.apot(4)


def module(observer: str, led: bool) -> FakeQuantize:
    """A calibrated fake-quant in train mode; ``led``: its observer goes on and leads α."""
    made = FakeQuantize.for_activation(ActivationSpec(4, observer=observer), signed=True)
    made(torch.randn(1000))
    made.train()
    made.observer_enabled = led
    return made


def row(size: int) -> dict[str, object]:
    """One size: microseconds of a clone, and what else costs against it."""
    x, kept = torch.randn(size), torch.empty(size)
    rows, alpha, alphas = x.reshape(64, -1), torch.tensor(2.0), torch.full((64,), 2.0)
    leaf, clip = x.clone().requires_grad_(), alpha.clone().requires_grad_()
    scale, zero = torch.tensor([0.1], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    grad, alone, led = torch.randn(size), module("minmax", False), module("minmax", True)
    spec = LEVELS.spec

    def learn() -> None:
        eager.fake_quantize(leaf, clip, spec, None, None, "rcf").backward(grad)

    def learn_torch() -> None:
        op = torch._fake_quantize_learnable_per_tensor_affine
        op(leaf, scale, zero, -8, 7, 1.0).backward(grad)

    rounds = 200 if size < 2**18 else 15
    names = ("clone again copy ours channels torchs learned learned_torch packed histogram").split()
    found = medians(
        x.clone,
        x.clone,
        lambda: kept.copy_(x),
        lambda: eager.fake_quantize(x, alpha, spec),
        lambda: eager.fake_quantize(rows, alphas, spec, 0),
        lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7),
        learn,
        learn_torch,
        lambda: torch.ops.apot_fx.quantize_packed(x, alpha, spec),
        lambda: torch.ops.apot_fx.histogram(x),
        rounds=rounds,
    )
    # By themselves, since what was freed before decides whether a result gets fresh pages.
    found += medians(lambda: alone(x), lambda: led(x), rounds=rounds)
    names += ["alone", "led"]
    ms = dict(zip(names, found, strict=True))

    def ratio(what: str, against: str) -> str:
        return f"{ms[what] / ms[against]:.2f}"

    return {
        "values": size,
        "clone us": f"{1e3 * ms['clone']:.1f}",
        "A/A": ratio("again", "clone"),
        "copy_ / clone": ratio("copy", "clone"),
        "fake-quant / clone": ratio("ours", "clone"),
        "per channel / clone": ratio("channels", "clone"),
        "torch / fake-quant": ratio("torchs", "ours"),
        "with gradients / clone": ratio("learned", "clone"),
        "torch / with gradients": ratio("learned_torch", "learned"),
        "packed / copy_": ratio("packed", "copy"),
        "histogram / copy_": ratio("histogram", "copy"),
        "led by observer / fake-quant": ratio("led", "alone"),
    }


def main() -> None:
    found = [row(size) for size in SIZES]
    notes = [f"{torch.get_num_threads()} threads, torch {torch.__version__}; kernels: {status()}"]
    table = Table(tuple(found[0]), found, title="kernels, ratios of medians", notes=notes)
    print(table)
    Path(__file__).with_suffix(".json").write_text(table.to_json() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
