"""The old qconfigs quantize a small model end to end, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import apot_fx
from apot_fx import QConfig, QConfigMapping, compat

NAMES = [f"{kind}_qconfig_{bits}bit" for kind in ("uniform", "apot_weight", "apot")
         for bits in (8, 4)]  # fmt: skip


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
              nn.Flatten(), nn.Linear(128, 10)]  # fmt: skip
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("name", NAMES)
def test_prepare_calibrate_convert(name: str) -> None:
    config, model, x = getattr(compat, name), net(), torch.randn(16, 3, 8, 8)
    assert isinstance(config, QConfig)
    prepared = apot_fx.prepare_apot(model, config)
    apot_fx.calibrate(prepared, [x], progress=False)
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, [x]).status == "bit-exact"
    wanted = model(x)
    error = (converted(x) - wanted).norm() / wanted.norm()
    assert error < (0.05 if name.endswith("8bit") else 0.4)


@pytest.mark.parametrize("name", NAMES)
def test_what_they_say(name: str) -> None:
    config, bits = getattr(compat, name), int(name[-4])
    kinds = {"uniform": ("uniform", "uniform"), "apot_weight": ("apot", "uniform"),
             "apot": ("apot", "apot")}[name.split("_qconfig")[0]]  # fmt: skip
    assert (config.weight.kind, config.activation.kind) == kinds
    assert config.weight.bits == config.activation.bits == bits
    assert config.weight.observer == config.activation.observer == "minmax"
    for spec in (config.weight, config.activation):
        assert spec.kind == "uniform" or (spec.k, spec.scheme) == (2, "torch")


def test_weights_have_the_levels_of_the_observer() -> None:
    weight = torch.randn(4, 8)
    observer = compat.APoTObserver(4, 2)
    observer(weight)
    layer = nn.Linear(8, 4)
    layer.weight.data = weight
    prepared = apot_fx.prepare_apot(layer, compat.apot_qconfig_4bit)
    fakes = [m for n, m in prepared.named_modules() if n.endswith("weight_fake_quant")]
    ours = fakes[0](weight)
    theirs = compat.quant_dequant_APoT(weight, *observer.calculate_qparams(signed=True))
    assert torch.equal(ours, theirs)


def test_in_a_mapping_and_in_training() -> None:
    mapping = QConfigMapping.from_preset("w4a4").set_module_name("3", compat.apot_qconfig_8bit)
    prepared = apot_fx.prepare_apot(net(), mapping).train()
    x = torch.randn(8, 3, 8, 8)
    prepared(x).square().mean().backward()
    assert all(p.grad is not None for n, p in prepared.named_parameters() if "alpha" in n)
