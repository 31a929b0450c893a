"""Unseen models of every kind of part: float bits, 0 differing bits, other sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apot_fx
from apot_fx import ActivationSpec, QConfig, WeightSpec
from apot_fx.values import same_bits
from tests.random_models import RandomModel

CONFIGS: dict[str, Any] = {
    "w4a4": "w4a4",
    "w8a8": "w8a8",
    "w4": "w4",
    "integer": QConfig(WeightSpec(4), ActivationSpec(4, residual=8)),
    "groups": QConfig(WeightSpec(4, granularity="group", group_size=3), ActivationSpec(4)),
}


def check(seed: int, config: Any, with_example: bool) -> None:
    model = RandomModel(seed).eval()
    batches = [model.batch(3, 6), model.batch(3, 6), model.batch(5, 6), model.batch(2, 8)]
    example = batches[0] if with_example else None
    prepared = apot_fx.prepare_apot(model, config, example_inputs=example)
    apot_fx.calibrate(prepared, batches, progress=False)
    converted = apot_fx.convert_apot(prepared)
    verdict = apot_fx.check_parity(prepared, converted, batches)
    assert verdict.ok, str(verdict)
    assert apot_fx.explain(prepared).rows
    with torch.no_grad():
        for batch in batches:
            assert same_bits(prepared.eval()(batch), converted(batch))
    prepared.apply(apot_fx.disable_fake_quant)
    prepared.apply(apot_fx.disable_observer)
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            for batch in batches:
                assert same_bits(model(batch), prepared(batch))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_random_models(seed: int, with_example: bool) -> None:
    check(seed, "w4a4", with_example)


@pytest.mark.slow
@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", range(100, 124))
def test_more_random_models(seed: int, config: str, with_example: bool) -> None:
    check(seed, CONFIGS[config], with_example)
