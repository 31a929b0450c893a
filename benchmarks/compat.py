"""ns per element of compat beside the per-element algorithm of PyTorch's experimental APoT.

The original is re-stated here: for every element all levels are unpacked into 0-dim tensors and
compared one by one, and a code is found again by searching the list of codes. It runs on 10^4
elements, compat on 10^6, both on one thread and the same qparams, and their values are compared.
Run alone (`python benchmarks/compat.py`) or by `make bench`. Prints a table and writes
`benchmarks/compat.json`. The A/A line is compat's quantize timed twice. Reach: 20,000 times.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from apot_fx.compat import APoTObserver, APoTQuantizer, TensorAPoT
from apot_fx.table import Table

COLUMNS = ("what", "ns per element", "original", "times as fast")
HERE, THERE, REACH = 10**6, 10**4, 20_000


def nearest_code(
    x: float, levels: torch.Tensor, codes: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    """The original's rule for one element inside ±α: the first level at the least distance."""
    assert -alpha <= x <= alpha
    least, found = float("inf"), codes[0]
    for level, code in zip(list(levels), list(codes), strict=True):
        distance = abs(level - x)
        if distance < least:
            least, found = distance, code
    return found


def original_quantize(quantizer: APoTQuantizer, x: torch.Tensor) -> torch.Tensor:
    levels, codes, alpha = quantizer.quantization_levels, quantizer.level_indices, quantizer.alpha
    return x.clone().apply_(lambda value: nearest_code(value, levels, codes, alpha)).int()


def original_dequantize(quantizer: APoTQuantizer, codes: torch.Tensor) -> torch.Tensor:
    levels, flat = quantizer.quantization_levels, codes.flatten()
    found = np.empty(len(flat))
    for place in range(len(flat)):
        found[place] = levels[list(quantizer.level_indices).index(flat[place])]
    return torch.from_numpy(found).reshape(codes.shape)


def once(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    result = call()
    return result, 1e9 * (time.perf_counter() - start)


def median(call: Callable[[], object], rounds: int = 25) -> float:
    """Median nanoseconds per element of HERE elements."""
    times = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        times.append(1e9 * (time.perf_counter() - start) / HERE)
    return statistics.median(times[2:])


def row(what: str, here: float, there: float) -> dict[str, object]:
    values = (what, f"{here:.2f}", f"{there:,.0f}", f"{there / here:,.0f}")
    return dict(zip(COLUMNS, values, strict=True))


def measure(b: int, k: int, signed: bool) -> list[dict[str, object]]:
    torch.manual_seed(0)
    x = torch.rand(HERE) * (2 if signed else 1) - (1 if signed else 0)
    observer = APoTObserver(b, k)
    quantizer = APoTQuantizer(*observer.calculate_qparams(signed, min_val=-1.0, max_val=1.0))
    few = x[:THERE]
    codes, slow = once(lambda: original_quantize(quantizer, few))
    values, slow_back = once(lambda: original_dequantize(quantizer, codes))
    ours = quantizer.quantize(few)
    same = int((quantizer.dequantize(ours) == values).sum())
    assert same >= THERE - 2, f"{THERE - same} values differ"  # within ULPs of a threshold
    slow, slow_back = slow / THERE, slow_back / THERE
    all_codes = TensorAPoT(quantizer, quantizer.quantize(x).data)
    name = f"b{b}k{k}{' signed' if signed else ''}, {len(quantizer.level_indices)} codes"
    here = median(lambda: quantizer.quantize(x))
    again = median(lambda: quantizer.quantize(x))
    back = median(lambda: quantizer.dequantize(all_codes))
    both = median(lambda: quantizer.quant_dequant(x))
    return [
        row(f"quantize, {name}", here, slow),
        row("quantize again (A/A)", again, slow),
        row("dequantize", back, slow_back),
        row("quantize and dequantize", both, slow + slow_back),
    ]


def main() -> None:
    torch.set_num_threads(1)  # as the original, which is a Python loop
    rows = [*measure(4, 2, False), *measure(4, 2, True)]
    note = f"one thread each, torch {torch.__version__}; reach {REACH:,} times"
    table = Table(COLUMNS, rows, title="compat beside the original algorithm", notes=[note])
    print(table)
    Path(__file__).with_suffix(".json").write_text(table.to_json() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
