"""Memory stays below its limit: what is more lies in a file."""

from __future__ import annotations

import subprocess
import sys
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apot_fx import QConfig
from apot_fx.ptq import adaround
from apot_fx.ptq.shelf import Kept, Shelf
from tests.nets import calibrated, seeded


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: UserDict(input=x)], ids=["plain", "object"]
)
@pytest.mark.parametrize("limit", [0, 3000, 10000])
def test_shelves_hold_no_more_than_the_limit(
    limit: int, wrap: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_shelves: list[Shelf] = []
    held, spilled = [0], [0]
    real_put, real_exit = Shelf.put, Shelf.__exit__

    def put(shelf: Shelf, value: Any) -> Kept:
        if shelf not in open_shelves:
            open_shelves.append(shelf)
        kept = real_put(shelf, value)
        held.append(sum(one.held for one in open_shelves))
        spilled.append(sum(one.spilled for one in open_shelves))
        return kept

    def leave(shelf: Shelf, *problem: object) -> None:
        open_shelves.remove(shelf)
        real_exit(shelf, *problem)

    monkeypatch.setattr(Shelf, "put", put)
    monkeypatch.setattr(Shelf, "__exit__", leave)
    model = seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
    batches = [torch.randn(16, 8) for _ in range(8)]
    prepared = calibrated(model, batches, QConfig.from_preset("w3a8"))
    given = [wrap(x) for x in batches]
    adaround(prepared, given, steps=5, cache_limit=limit, progress=False)
    total = 8 * 16 * 8 * 4  # bytes of the batches; a unit has as many twice
    assert max(held) <= limit < 3 * total and max(spilled) >= 3 * total - limit
    assert not open_shelves


SCRIPT = """
import re, sys, torch
from torch import nn
import apot_fx
from apot_fx.ptq import adaround
torch.manual_seed(0)
convolutions = [nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(3)]
config = apot_fx.QConfig.from_preset("w3a8")
prepared = apot_fx.prepare_apot(nn.Sequential(*convolutions).eval(), config)
batches = [torch.randn(4, 8, 64, 64) for _ in range(4)]
apot_fx.calibrate(prepared, batches, progress=False)
many = (torch.randn(4, 8, 64, 64) for _ in range(200))  # 100 MB
adaround(prepared, many, steps=2, batch_size=4, cache_limit=int(sys.argv[1]), progress=False)
# Not ru_maxrss: that starts with what the process had that started this one.
peak = re.search("VmHWM: *([0-9]+)", open("/proc/self/status").read().replace("\\t", " "))
print(int(peak[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory as Linux tells it")
def test_the_process_stays_small() -> None:
    peaks = []
    for limit in (2**30, 2**24):
        command = [sys.executable, "-c", SCRIPT, str(limit)]
        root = str(Path(__file__).parents[2])
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
        peaks.append(int(done.stdout))
    # 100 MB of batches and twice that of activations at a time, of which 16 MB stay in memory.
    assert peaks[1] < peaks[0] - 200
