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

from apot_fx import LevelSet
from apot_fx.kernels import eager, status
from apot_fx.observer import MinMaxObserver
from apot_fx.table import Table

SIZES = (2**10, 2**14, 2**18, 2**20, 2**22, 2**24)
SPEC = LevelSet.apot(4).spec


def row(size: int) -> dict[str, object]:
    """One size: microseconds of a clone, and what else costs against it."""
    x, kept = torch.randn(size), torch.empty(size)
    rows, alpha, alphas = x.reshape(64, -1), torch.tensor(2.0), torch.full((64,), 2.0)
    leaf, clip = x.clone().requires_grad_(), alpha.clone().requires_grad_()
    scale, zero = torch.tensor([0.1], requires_grad=True), torch.tensor([0.0], requires_grad=True)
    grad, observer = torch.randn(size), MinMaxObserver()

    def learn() -> None:
        eager.fake_quantize(leaf, clip, SPEC, None, None, "rcf").backward(grad)

    def learn_torch() -> None:
        op = torch._fake_quantize_learnable_per_tensor_affine
        op(leaf, scale, zero, -8, 7, 1.0).backward(grad)

    def observe() -> None:
        observer(x)
        eager.fake_quantize(x, alpha, SPEC)

    clone, again, copy, ours, channels, torchs, learned, learned_torch, observed = medians(
        x.clone,
        x.clone,
        lambda: kept.copy_(x),
        lambda: eager.fake_quantize(x, alpha, SPEC),
        lambda: eager.fake_quantize(rows, alphas, SPEC, 0),
        lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7),
        learn,
        learn_torch,
        observe,
        rounds=200 if size < 2**18 else 15,
    )
    return {
        "values": size,
        "clone us": f"{1e3 * clone:.1f}",
        "A/A": f"{again / clone:.2f}",
        "copy_ / clone": f"{copy / clone:.2f}",
        "fake-quant / clone": f"{ours / clone:.2f}",
        "per channel / clone": f"{channels / clone:.2f}",
        "torch / fake-quant": f"{torchs / ours:.1f}",
        "with gradients / clone": f"{learned / clone:.2f}",
        "torch / with gradients": f"{learned_torch / learned:.1f}",
        "observed / fake-quant": f"{observed / ours:.2f}",
    }


def main() -> None:
    found = [row(size) for size in SIZES]
    notes = [f"{torch.get_num_threads()} threads, torch {torch.__version__}; kernels: {status()}"]
    table = Table(tuple(found[0]), found, title="kernels, ratios of medians", notes=notes)
    print(table)
    Path(__file__).with_suffix(".json").write_text(table.to_json() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
