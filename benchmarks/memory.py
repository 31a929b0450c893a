"""Peak memory of weight-only quantization in place, against what the float model holds.

Run alone (`python benchmarks/memory.py`) or by `make bench`; Linux only. A transformers Llama of
some 200 M random parameters, in a process of its own per dtype. Prints MB and ratios and writes
`benchmarks/memory.json`. The aim: no verb's peak lies more than 10 % above what the process holds
with the float32 model.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import apot_fx
from apot_fx.table import Table

COLUMNS = ("dtype", "what", "resident MB", "peak MB", "peak / float")
DTYPES = ("float32", "bfloat16")
LIMIT = 1.10


def llama(dtype: str) -> nn.Module:
    """220 M parameters; the head's and the embedding's 33 M each stay float by the preset."""
    sys.path.insert(0, str(Path(__file__).parent))
    from zoo import declare_torchvision_operators

    declare_torchvision_operators()
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=False,
    )  # fmt: skip
    model: nn.Module = transformers.LlamaForCausalLM(config).eval()
    return model.to(getattr(torch, dtype))


def resident(key: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (the most since :func:`restart`) of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def restart() -> None:
    """Give freed memory back to the system and start ``VmHWM`` anew."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(dtype: str) -> dict[str, Any]:
    """Build, prepare and convert here; what is resident after each, and its peak."""
    torch.manual_seed(0)
    model = llama(dtype)
    # What the verbs import is no part of what they hold.
    small = apot_fx.prepare_apot(nn.Sequential(nn.Linear(8, 8)), "w4", inplace=True)
    apot_fx.convert_apot(small, inplace=True, low_memory=True)
    parameters = sum(p.numel() for p in model.parameters())
    found: dict[str, Any] = {"parameters": parameters, "steps": []}

    held = [model]  # all that holds it
    del model

    def step(what: str, run: Callable[[nn.Module], nn.Module]) -> None:
        restart()
        held.append(run(held.pop()))
        found["steps"].append((what, resident("VmRSS"), resident("VmHWM")))

    step("float", lambda model: model)
    step("prepare_apot", lambda model: apot_fx.prepare_apot(model, "w4", inplace=True))
    step("convert_apot", lambda m: apot_fx.convert_apot(m, inplace=True, low_memory=True))
    step("after trimming", lambda model: model)
    return found


def main() -> None:
    if sys.argv[1:2] == ["here"]:
        print(json.dumps(measure(sys.argv[2])))
        return
    rows, ratios, count = [], {}, 0
    for dtype in DTYPES:
        command = [sys.executable, __file__, "here", dtype]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        count, base = found["parameters"], found["steps"][0][1]
        ratios[dtype] = max(peak for _, _, peak in found["steps"]) / base
        for what, now, peak in found["steps"]:
            cells = (dtype, what, f"{now:.0f}", f"{peak:.0f}", f"{peak / base:.3f}")
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
    note = f"{count / 1e6:.0f} M parameters, the interpreter's memory included; torch "
    table = Table(COLUMNS, rows, title="peak, w4 in place", notes=[note + torch.__version__])
    print(table)
    Path(__file__).with_suffix(".json").write_text(table.to_json() + "\n", encoding="utf-8")
    if ratios["float32"] > LIMIT:
        raise SystemExit(f"the peak is {ratios['float32']:.3f} of the float model, above {LIMIT}")


if __name__ == "__main__":
    main()
