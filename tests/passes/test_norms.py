"""Batch norms of subclasses are torch's own again; those that stay apart run on indices."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import nn

import apot_fx
from apot_fx import ActivationSpec, QConfig, WeightSpec
from apot_fx.passes.edges import index_edges


class NormAct(nn.BatchNorm2d):
    """Batch norm and its activation, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        train = self.training or self.running_mean is None
        if self.training:
            train = True
        y = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, train, 0.1, self.eps
        )
        return self.act(y)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), NormAct(4)
        self.pre, self.conv = NormAct(8), nn.Conv2d(8, 4, 3, padding=1)
        self.last = nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.stem(x))
        both = torch.cat([y, y.flip(1)], 1)
        more = self.conv(self.pre(both))
        return self.last(torch.cat([both, more], 1))


def _trained() -> Dense:
    torch.manual_seed(0)
    model = Dense().train()
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    return model.eval()


def test_subclass_folds_and_follows_the_mode() -> None:
    model, x = _trained(), torch.randn(2, 3, 8, 8)
    prepared = apot_fx.prepare_apot(model, "w4a4")
    assert prepared.state_dict().keys() >= model.state_dict().keys()
    assert "batch norm norm folded" in str(apot_fx.explain(prepared, "stem").rows[0]["why"])
    apot_fx.calibrate(prepared, [x], progress=False)
    before = prepared.norm.running_mean.clone()
    prepared.train()(x)
    assert not torch.equal(before, prepared.norm.running_mean)
    prepared.eval()
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, [x]).ok
    prepared.apply(apot_fx.disable_fake_quant)
    model.load_state_dict({k: prepared.state_dict()[k] for k in model.state_dict()})
    assert torch.equal(prepared(x), model(x))


def test_pre_activation_networks_carry_indices() -> None:
    model, x = _trained(), torch.randn(2, 3, 8, 8)
    config = QConfig(WeightSpec(4), ActivationSpec(4, residual=8))
    prepared = apot_fx.prepare_apot(model, config, example_inputs=x)
    apot_fx.calibrate(prepared, [x, x.to(memory_format=torch.channels_last)], progress=False)
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, [x]).ok
    carried, edges = index_edges(prepared)
    assert carried == edges > 4 and index_edges(converted)[0] > 0
    again = apot_fx.convert_apot(prepared)
    again.load_state_dict(converted.state_dict(), strict=True)
    assert torch.equal(again(x), converted(x))
    prepared.train()
    prepared(x).sum().backward()
    assert prepared.pre.weight.grad is not None
