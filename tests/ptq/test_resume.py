"""Interrupted and resumed: the same bits, from a checkpoint that refuses what is not its own."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from apot_fx import QConfig
from apot_fx.errors import StateError
from apot_fx.ptq import adaround, learn, run
from apot_fx.ptq.weights import Weight
from apot_fx.values import same_bits
from tests.nets import calibrated, seeded

OPTIONS = {"steps": 40, "progress": False}


def start() -> tuple[nn.Module, list[torch.Tensor]]:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(6):
            layers += [nn.Linear(8, 8), nn.ReLU()]
        return nn.Sequential(*layers)

    torch.manual_seed(5)
    batches = [torch.randn(16, 8) for _ in range(3)]
    return calibrated(seeded(build), batches, QConfig.from_preset("w3a8")), batches


@pytest.fixture(scope="module")
def whole() -> dict[str, torch.Tensor]:
    prepared, batches = start()
    adaround(prepared, batches, **OPTIONS)
    return prepared.state_dict()


@pytest.mark.parametrize("limit", [2**30, 700], ids=["memory", "spilled"])
@pytest.mark.parametrize("stop_at", [5, 50, 90])
def test_interrupted_and_resumed(
    stop_at: int, limit: int, tmp_path: Path, whole: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, batches = start()
    before = copy.deepcopy(prepared.state_dict())
    steps = 0

    def interrupting(step: int, *rest: float) -> float:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            raise KeyboardInterrupt
        return real(step, *rest)

    real = learn.annealed_beta
    options = {**OPTIONS, "checkpoint": tmp_path / "half.pt", "cache_limit": limit}
    with monkeypatch.context() as patch:
        patch.setattr(learn, "annealed_beta", interrupting)
        with pytest.raises(KeyboardInterrupt):
            adaround(prepared, batches, **options)
    assert same_bits(before, prepared.state_dict())  # as it was
    adaround(prepared, batches, **options)
    assert same_bits(whole, prepared.state_dict())


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.ptq.test_resume import OPTIONS, start
from apot_fx.ptq import adaround
prepared, batches = start()
adaround(prepared, batches, **OPTIONS, checkpoint={file!r})
"""


def test_killed_and_resumed(tmp_path: Path, whole: object) -> None:
    root, file = str(Path(__file__).parents[2]), tmp_path / "killed.pt"
    command = [sys.executable, "-c", SCRIPT.format(root=root, file=str(file))]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root})
    while not file.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    prepared, batches = start()
    adaround(prepared, batches, **OPTIONS, checkpoint=file)
    assert same_bits(whole, prepared.state_dict())


def test_interrupted_while_it_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared, batches = start()
    before, calls = copy.deepcopy(prepared.state_dict()), 0

    def interrupting(weight: Weight, up: torch.Tensor) -> float:
        nonlocal calls
        calls += weight.value.data_ptr() in own
        if calls == 3:
            raise KeyboardInterrupt
        return learn.commit(weight, up)

    own = {p.data_ptr() for p in prepared.parameters()}
    monkeypatch.setattr(run, "commit", interrupting)
    with pytest.raises(KeyboardInterrupt):
        adaround(prepared, batches, **OPTIONS)
    assert calls == 3 and same_bits(before, prepared.state_dict())


def test_a_finished_checkpoint_is_replayed(
    tmp_path: Path, whole: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, batches = start()
    table = adaround(prepared, batches, **OPTIONS, checkpoint=tmp_path / "all.pt")
    monkeypatch.setattr(learn, "annealed_beta", None)  # nothing is learned again
    again, _ = start()
    assert adaround(again, batches, **OPTIONS, checkpoint=tmp_path / "all.pt").rows == table.rows
    assert same_bits(whole, again.state_dict())


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    prepared, batches = start()
    file = tmp_path / "one.pt"
    adaround(copy.deepcopy(prepared), batches, **OPTIONS, checkpoint=file)
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(StateError, match=r"one\.pt was made with other options.*'steps': 40"):
        adaround(prepared, batches, steps=41, checkpoint=file)
    with pytest.raises(StateError, match=r"other batches.*no shuffling"):
        adaround(prepared, batches[::-1], **OPTIONS, checkpoint=file)
    other = copy.deepcopy(prepared)
    with torch.no_grad():
        other.get_submodule("0.weight_fake_quant").alpha[0] *= 2
    with pytest.raises(StateError, match=r"other weights, alphas or statistics"):
        adaround(other, batches, **OPTIONS, checkpoint=file)
    file.write_bytes(b"no checkpoint")
    with pytest.raises(StateError, match=r"one\.pt is no checkpoint of adaround"):
        adaround(prepared, batches, **OPTIONS, checkpoint=file)
    assert same_bits(before, prepared.state_dict())
