"""Unseen architectures: float bits with fake-quants off, the NumPy oracle, 0 differing bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import apot_fx
from apot_fx import ActivationSpec, QConfig, WeightSpec
from tests.nets import calibrated
from tests.numpy_oracle import Oracle
from tests.random_nets import random_net

CONFIGS: dict[str, Any] = {
    "w3a3": "w3a3",
    "w4a4": "w4a4",
    "w5a5": "w5a5",
    "w8a8": "w8a8",
    "residual": QConfig(WeightSpec(4), ActivationSpec(4, residual=8)),
    "groups": QConfig(WeightSpec(4, granularity="group", group_size=7), ActivationSpec(4)),
    "tensor": QConfig(WeightSpec(5, granularity="tensor"), ActivationSpec(5, signed=True)),
    "torch": QConfig(WeightSpec(4, scheme="torch"), ActivationSpec(4, scheme="torch")),
}


def tensors(value: Any) -> list[torch.Tensor]:
    return list(value.values()) if isinstance(value, dict) else [value]


def check(seed: int, config: Any) -> None:
    model, batches = random_net(seed)
    prepared = calibrated(model, batches, config)
    prepared.apply(apot_fx.disable_fake_quant)
    for mine, floats in zip(tensors(prepared(batches[0])), tensors(model(batches[0])), strict=True):
        assert torch.equal(mine, floats)
    prepared.apply(apot_fx.enable_fake_quant)
    if seed % 2:
        prepared.train()
        sum(t.sum() for t in tensors(prepared(batches[0]))).backward()
        prepared.eval()
    converted = apot_fx.convert_apot(prepared)
    verdict = apot_fx.check_parity(prepared, converted, batches)
    assert verdict.ok, str(verdict)
    assert max(verdict.train_form.values()) <= 1e-5
    with torch.no_grad():
        expected = Oracle(prepared).run(batches[0])
        found = converted(batches[0])
    if config != CONFIGS["residual"]:  # the oracle knows no pool on indices
        for mine, oracle in zip(tensors(found), tensors(expected), strict=True):
            assert torch.equal(mine, oracle)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("config", ["w4a4", "w3a3"])
def test_random_nets(seed: int, config: str) -> None:
    check(seed, CONFIGS[config])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
@pytest.mark.parametrize("config", CONFIGS)
def test_more_random_nets(seed: int, config: str) -> None:
    check(seed, CONFIGS[config])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("seed", range(6))
def test_random_nets_exported(seed: int) -> None:
    """An export, decomposed or not, prepares as its model: α and outputs in bits."""
    model, batches = random_net(seed)
    program = torch.export.export(model.eval(), (batches[0],))
    if seed % 2:
        program = program.run_decompositions()
    models = (program.module(), model)
    prepared = [apot_fx.prepare_apot(m, "w4a4", (batches[0],)) for m in models]
    for stage in prepared:
        apot_fx.calibrate(stage, batches[:1])
    mine, theirs = ({k: v for k, v in p.state_dict().items() if "alpha" in k} for p in prepared)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    converted = [apot_fx.convert_apot(p) for p in prepared]
    assert apot_fx.check_parity(prepared[0], converted[0], batches[:1]).ok
    with torch.no_grad():
        outputs = (tensors(stage(batches[0])) for stage in converted)
        assert all(torch.equal(*pair) for pair in zip(*outputs, strict=True))
