"""Which kernels run: the environment, forked children, machines without the compiled library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from apot_fx import LevelSet
from apot_fx.kernels import dispatch, native, status

compiled = pytest.mark.skipif(native.loaded() is None, reason=status().reason)


@compiled
def test_a_forked_child_computes_alone() -> None:
    x = torch.randn(200_000)
    arguments = (x, torch.tensor(0.8), LevelSet.apot(4, 2, True).spec)
    expected = dispatch.fake_quantize(*arguments)  # the parent's threads exist
    child = os.fork()
    if child == 0:
        found = dispatch.fake_quantize(*arguments)
        torch.set_num_threads(1)  # torch.equal itself would wait for the parent's threads
        os._exit(0 if torch.equal(found, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def run_with(isa: str) -> subprocess.CompletedProcess[str]:
    code = "import apot_fx.kernels as k; print(k.status().isa)"
    environment = {**os.environ, "APOT_FX_ISA": isa}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )


@compiled
def test_the_environment_chooses() -> None:
    assert run_with("reference").stdout.strip() == "reference"
    assert run_with("portable").stdout.strip() == "portable"
    wrong = run_with("avx3")
    assert wrong.returncode and "did you mean" in wrong.stderr.lower()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library_path", lambda: None)
    monkeypatch.delenv("APOT_FX_ISA", raising=False)
    found, state = native._load.__wrapped__()
    assert found is None and state.isa == "reference" and "compiler" in state.reason
