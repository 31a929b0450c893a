"""Say which kernels run on this machine, and what a fake-quant costs beside a copy."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from ..table import Table

_SIZES = (2**10, 2**14, 2**18, 2**20, 2**22)


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--bits", type=int, default=4, help="bits of the signed APoT set (4)")


def run(options: argparse.Namespace) -> int:
    from ..kernels import status

    found = status()
    rows = [_row(size, options.bits) for size in _SIZES]
    table = Table(
        tuple(rows[0]), rows, title="fake-quant against clone", notes=[f"kernels: {found}"]
    )
    print(table.to_json() if options.json else table)
    return 0


def _row(size: int, bits: int) -> dict[str, object]:
    import torch

    from ..kernels import eager
    from ..levels import LevelSet

    x, alpha, spec = torch.randn(size), torch.tensor(2.0), LevelSet.apot(bits).spec
    rounds = 200 if size < 2**18 else 20
    clone = _median(x.clone, rounds)
    ours = _median(lambda: eager.fake_quantize(x, alpha, spec), rounds)
    again = _median(x.clone, rounds)
    torchs = _median(lambda: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7), rounds)
    return {
        "values": size,
        "clone us": f"{1e6 * clone:.1f}",
        "A/A": f"{again / clone:.2f}",
        "fake-quant": f"{ours / clone:.2f}",
        "torch's uniform": f"{torchs / clone:.2f}",
    }


def _median(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])
