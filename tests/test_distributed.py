"""Two processes under ``torch.distributed`` against one with the joined batches."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import ranks

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch without gloo"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank saved."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":  # no look-up of the machine's own name
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", str(rank), folder / "store", folder / str(rank)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks.WORLD)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0, text
    return [torch.load(folder / str(rank)) for rank in range(ranks.WORLD)]


def assert_same_bits(one: ranks.Result, other: ranks.Result, start: str = "") -> None:
    keys = [key for key in one if key.startswith(start)]
    assert keys and keys == [key for key in other if key.startswith(start)]
    for key in keys:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("name", ranks.OBSERVERS)
def test_calibration_is_that_of_the_joined_batches(
    results: list[dict[str, Any]], name: str
) -> None:
    expected = ranks.calibration(0, 1, name)
    assert len([key for key in expected if key.endswith("alpha")]) == 3
    for result in results:
        assert_same_bits(result[f"calibration {name}"], expected)


def test_a_rank_that_sees_only_zeros_keeps_step(results: list[dict[str, Any]]) -> None:
    expected = ranks.recurrent_calibration(0, 1)
    for result in results:
        assert_same_bits(result["recurrent_calibration"], expected)


@pytest.mark.parametrize("run", ranks.TRAINING)
def test_training_is_that_of_the_joined_batches(
    results: list[dict[str, Any]], run: Callable[[int, int], ranks.Result]
) -> None:
    expected = run(0, 1)
    first, second = (result[run.__name__] for result in results)
    assert_same_bits(first, second)
    assert_same_bits(first, expected, "first.")
    for key, value in expected.items():
        if key.startswith("last."):
            apart = (first[key].double() - value.double()).abs().max()
            assert apart <= 1e-5 * value.double().abs().max(), key
    for number in range(2):  # or the test would say little
        alpha = f"activation_post_process_{number}.alpha"
        assert expected[f"first.{alpha}"] != expected[f"last.{alpha}"]


def test_ranks_with_different_numbers_of_batches_are_refused(
    results: list[dict[str, Any]],
) -> None:
    few, many = (result["uneven"] for result in results)
    assert few.startswith("this rank has only 1 batches, another has more")
    assert many.startswith("this rank has more than 1 batches, another has no more")
    assert few.endswith("unchanged: True") and many.endswith("unchanged: True")
