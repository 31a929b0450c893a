"""What a verdict says beside right and wrong."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import apot_fx
from apot_fx.errors import CalibrationError, StageError
from tests.nets import branches, calibrated, mlp


def test_exact_verdict_counts_values_and_nodes() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    verdict = apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), batches)
    assert verdict.ok and verdict.status == "bit-exact"
    assert str(verdict).startswith(f"bit-exact over {verdict.values} values in ")
    content = json.loads(verdict.to_json())
    assert content["ok"] is True and content["values"] == verdict.values
    assert len(verdict.table().rows) == len(verdict.stored) + len(verdict.nodes)


def test_train_form_is_close_to_integer_form() -> None:
    for model, batches in (branches(), mlp()):
        prepared = calibrated(model, batches)
        verdict = apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), batches)
        layers = {n for n, m in prepared.named_modules() if hasattr(m, "weight_fake_quant")}
        assert set(verdict.train_form) == layers
        assert max(verdict.train_form.values()) <= 1e-5
        assert "train form against integer form" in str(verdict)


class Random(nn.Module):
    """Draws noise from Python's generator: differs from itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(noise(x))


CALLS = [0]


def noise(x: torch.Tensor) -> torch.Tensor:
    CALLS[0] += 1
    return x + CALLS[0]


torch.fx.wrap("noise")


def test_nondeterministic_is_inconclusive() -> None:
    prepared = calibrated(Random().eval(), [torch.randn(3, 4)])
    converted = apot_fx.convert_apot(prepared)
    verdict = apot_fx.check_parity(prepared, converted, [torch.randn(3, 4)])
    assert not verdict.ok and "noise" in verdict.unstable


def test_seeded_noise_is_deterministic() -> None:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(nn.functional.dropout(x, 0.5))  # random in eval too

    prepared = calibrated(Drops().eval(), [torch.randn(3, 4)])
    verdict = apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [torch.randn(3, 4)])
    assert verdict.ok and verdict.values


def test_nan_inputs_are_reported_and_exact() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    bad = batches[0].clone()
    bad[0, 0, 0, 0], bad[1, 1, 1, 1] = float("nan"), float("inf")
    verdict = apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [bad])
    assert verdict.ok and verdict.nan_inputs >= 1 and "NaN" in str(verdict)


def test_stages_that_do_not_belong_together() -> None:
    (first, batches), (second, other) = branches(), mlp()
    prepared, foreign = calibrated(first, batches), calibrated(second, other)
    with pytest.raises(StageError, match="do not belong together"):
        apot_fx.check_parity(prepared, apot_fx.convert_apot(foreign), batches)
    fewer = apot_fx.QConfigMapping.from_preset("w4a4").set_module_name("left", None)
    with pytest.raises(StageError, match="'left'"):
        apot_fx.check_parity(
            prepared, apot_fx.convert_apot(calibrated(first, batches, fewer)), batches
        )


def test_other_weights_or_bits_differ() -> None:
    model, batches = mlp()
    prepared = calibrated(model, batches)
    with torch.no_grad():
        changed = calibrated(model, batches)
        changed.get_submodule("middle").weight[0, 0] += 1.0
    assert not apot_fx.check_parity(prepared, apot_fx.convert_apot(changed), batches).ok
    wider = calibrated(model, batches, "w5a5")
    assert not apot_fx.check_parity(prepared, apot_fx.convert_apot(wider), batches).ok


def test_no_batch() -> None:
    model, batches = mlp()
    prepared = calibrated(model, batches)
    with pytest.raises(CalibrationError, match="no batch"):
        apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [])


def test_stages_are_left_as_they_were() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    prepared.train()
    before = {k: v.clone() for k, v in prepared.state_dict().items()}
    random = torch.get_rng_state()
    assert apot_fx.check_parity(prepared, converted, batches).ok
    assert prepared.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[k], v) for k, v in prepared.state_dict().items())
    assert "forward" not in prepared.__dict__
