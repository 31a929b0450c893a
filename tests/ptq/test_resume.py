"""Interrupted and resumed: the same bits, from a checkpoint that refuses what is not its own."""

from __future__ import annotations

import copy
import io
import os
import signal
import subprocess
import sys
import time
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import apot_fx
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
    with pytest.raises(StateError, match=r"another forward"):
        adaround(prepared, batches, **OPTIONS, checkpoint=file, forward=lambda m, x: m(x * 2))
    assert same_bits(before, prepared.state_dict())


class Scaled(nn.Module):
    """Its batches hold more than tensors."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.activation, self.last = nn.Linear(8, 8), activation, nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return self.last(self.activation(self.first(x)) * scale)


def scaled(scale: float, activation: nn.Module | None = None, wrap: Any = dict) -> Any:
    torch.manual_seed(3)
    batches = [wrap(x=torch.randn(16, 8), scale=scale) for _ in range(3)]
    model = seeded(lambda: Scaled(activation or nn.ReLU()))
    prepared = apot_fx.prepare_apot(model, "w3")
    apot_fx.calibrate(prepared, batches, forward=by_names)
    return prepared, batches


def by_names(model: nn.Module, batch: Any) -> Any:
    return model(batch["x"], batch["scale"])


def named(x: torch.Tensor, scale: float) -> Any:
    return UserDict(x=x, scale=scale, tags={"b", "a"}, where=by_names)


@pytest.mark.parametrize("wrap", [dict, named])
def test_what_is_no_tensor_counts_too(wrap: Any, tmp_path: Path) -> None:
    options = {**OPTIONS, "steps": 5, "checkpoint": tmp_path / "scaled.pt"}
    adaround(*scaled(0.5, wrap=wrap), **options)
    adaround(*scaled(0.5, wrap=wrap), **options)  # the same, all of it made anew
    with pytest.raises(StateError, match="other batches"):
        adaround(*scaled(-3.0, wrap=wrap), **options)
    with pytest.raises(StateError, match="another model"):
        adaround(*scaled(0.5, nn.Tanh(), wrap=wrap), **options)


def never(*_: object) -> None:
    raise AssertionError("work was done")


def test_a_checkpoint_that_cant_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, _ = start()
    (tmp_path / "file").touch()
    bad: dict[object, str] = {
        5: "checkpoint is 5; the path of a file",
        tmp_path: "is a directory",
        tmp_path / "none" / "x.pt": "can't be written .No such file",
        str(tmp_path / "file" / "x.pt"): "can't be written",
    }
    monkeypatch.setattr(run, "check_batches", never)
    for path, message in bad.items():
        with pytest.raises(StateError, match=message):
            adaround(prepared, [], **OPTIONS, checkpoint=path)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


MANGLED: dict[str, Callable[[dict[str, Any]], object]] = {
    "no origin": lambda file: file.pop("origin"),
    "odd origin": lambda file: file.update(origin=5),
    "half an origin": lambda file: file["origin"].pop("batches"),
    "no units": lambda file: file.pop("units"),
    "odd unit": lambda file: file["units"].update({"0 … 4": 5}),
    "half a unit": lambda file: file["units"]["0 … 4"].pop("up"),
    "too few bits": lambda file: file["units"]["0 … 4"].update(
        up={"0.weight": (torch.zeros(1, dtype=torch.uint8), [8, 8])}
    ),
    "another shape": lambda file: file["units"]["0 … 4"].update(
        up={"0.weight": (torch.zeros(3, dtype=torch.uint8), [24])}
    ),
    "another weight": lambda file: file["units"]["0 … 4"].update(
        up={"zz": (torch.zeros(8, dtype=torch.uint8), [8, 8])}
    ),
    "another unit": lambda file: file["units"].update(zz=file["units"]["0 … 4"]),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    prepared, batches = start()
    file = tmp_path_factory.mktemp("finished") / "all.pt"
    adaround(prepared, batches, **OPTIONS, checkpoint=file)
    return file.read_bytes()


@pytest.mark.parametrize("name", MANGLED)
def test_a_mangled_checkpoint_is_refused(name: str, finished: bytes, tmp_path: Path) -> None:
    content = torch.load(io.BytesIO(finished), weights_only=True)
    MANGLED[name](content)
    torch.save(content, tmp_path / "bad.pt")
    prepared, batches = start()
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(StateError, match=r"bad\.pt is no checkpoint of adaround"):
        adaround(prepared, batches, **OPTIONS, checkpoint=tmp_path / "bad.pt")
    assert same_bits(before, prepared.state_dict())


def test_other_files_are_refused(finished: bytes, tmp_path: Path) -> None:
    prepared, batches = start()
    for content in (b"", b"no checkpoint", finished[: len(finished) // 2]):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(StateError, match=r"bad\.pt is no checkpoint of adaround"):
            adaround(prepared, batches, **OPTIONS, checkpoint=tmp_path / "bad.pt")
    torch.save({"version": 1, "units": {}}, tmp_path / "old.pt")
    with pytest.raises(StateError, match=r"old\.pt is of another version"):
        adaround(prepared, batches, **OPTIONS, checkpoint=tmp_path / "old.pt")


def test_sparse_batches_are_resumed_and_no_digest_is_made_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(torch.sparse.mm(edges, self.first(x))))

    def graphs(weight: float) -> Any:
        torch.manual_seed(0)
        return [(torch.randn(6, 8), (weight * torch.eye(6)).to_sparse()) for _ in range(3)]

    model = seeded(Graph)
    prepared = [calibrated(model, graphs(1.0), "w3a3") for _ in range(3)]
    options = {**OPTIONS, "steps": 5}
    adaround(prepared[0], graphs(1.0), **options, checkpoint=tmp_path / "sparse.pt")
    with pytest.raises(StateError, match="other batches"):
        adaround(prepared[1], graphs(2.0), **options, checkpoint=tmp_path / "sparse.pt")
    monkeypatch.setattr(run.Origin, "of", never)
    adaround(prepared[2], graphs(1.0), **options)
    assert same_bits(prepared[0].state_dict(), prepared[2].state_dict())
