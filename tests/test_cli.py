"""The command line: output, JSON, exit codes, nothing half-written."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from apot_fx.cli import COMMANDS, main
from apot_fx.kernels import status

MODULE = """
import torch
from torch import nn

class Broken(nn.Module):
    def forward(self, x):
        return x @ torch.zeros(5, 5)

def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

def batches():
    torch.manual_seed(1)
    return [torch.randn(4, 6) for _ in range(3)]

no_batches = []
number = 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("my_module", None)
    return tmp_path


def test_levels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["levels", "--bits", "4", "--k", "2", "--signed"]) == 0
    text = capsys.readouterr().out
    assert "index" in text and "exponents" in text and "-10" in text
    assert main(["levels", "--bits", "3", "--signed", "--alpha", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["value"] for row in rows] == [-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]
    assert main(["levels", "--bits", "6", "--k", "3", "--signed"]) == 2
    assert "legal k" in capsys.readouterr().err


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert "w4a4" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and "--json" in capsys.readouterr().out


def quantize(*more: str, model: str = "my_module:build_model", out: str = "out") -> int:
    return main(["quantize", model, "--data", "my_module:batches", "-o", out, *more])


def test_quantize(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize() == 0
    assert "bit-exact" in capsys.readouterr().out
    names = {path.name for path in (module / "out").iterdir()}
    assert names == {"explain.json", "summary.json", "parity.json", "state_dict.pt"}
    assert json.loads((module / "out/parity.json").read_text())["ok"] is True
    assert quantize() == 2
    assert "--force" in capsys.readouterr().err
    assert quantize("--force", "--config", "w3a3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["status"] == "bit-exact"


@pytest.mark.parametrize(("options", "text"), [
    ({"model": "my_module:buildmodel"}, "Did you mean 'build_model'"),
    ({"model": "no_such_module:x"}, "no_such_module"),
    ({"model": "my_module"}, "my_module:attribute"),
    ({"model": "my_module:number"}, "not an nn.Module"),
    ({"model": "my_module:Broken"}, "batch 0 does not run"),
])  # fmt: skip
def test_wrong_use_is_one_line(
    options: dict[str, str], text: str, module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(**options) == 2  # type: ignore[arg-type]
    error = capsys.readouterr().err
    assert text in error and "Traceback" not in error
    assert not (module / "out").exists() and not list(module.glob(".out-*"))


def test_wrong_config_and_data(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize("--config", "w4a44") == 2
    assert "Did you mean 'w4a4'" in capsys.readouterr().err
    no_data = ["quantize", "my_module:build_model", "--data", "my_module:no_batches", "-o", "out"]
    assert main(no_data) == 2
    assert "no batch" in capsys.readouterr().err
    assert not (module / "out").exists()


def test_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", "my_module:build_model"]) == 0
    text = capsys.readouterr().out
    assert "annotate" in text and "quantized" in text


def test_bench_says_which_kernels_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert f"kernels: {status().isa}" in capsys.readouterr().out
