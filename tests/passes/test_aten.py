"""GraphModules and exported programs prepare as the models they came from."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import fx, nn

import apot_fx
from apot_fx.nn import PreparedWeighted
from apot_fx.passes.aten import is_exported, rebuilt
from apot_fx.values import same_bits


class Residual(nn.Module):
    """One ReLU used twice in a block, batch norms, pools, in-place adds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.one, self.two = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.after = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(self.relu(self.norm(self.stem(x))))
        y = self.after(self.two(self.relu(self.one(x))))
        y += x
        y = functional.adaptive_avg_pool2d(self.relu(y), 1).flatten(1)
        return self.fc(self.drop(y))


class Mixed(nn.Module):
    """Attention, norms, a transposed convolution, a layer called twice, dicts in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8, bias=False)
        self.up = nn.ConvTranspose1d(8, 8, 4, stride=2, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: dict[str, torch.Tensor], scale: torch.Tensor) -> dict[str, Any]:
        x = self.norm(self.tokens(inputs["ids"]))
        q, k, v = self.qkv(x).chunk(3, -1)
        y = functional.scaled_dot_product_attention(q, k, v)
        y = functional.gelu(self.out(self.out(y))) * scale + x
        y = self.up(y.transpose(1, 2)).transpose(1, 2)
        return {"y": self.head(y[:, 1:-1]), "pair": (y.softmax(-1), y.mean(dim=1))}


def _residual() -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    model = Residual().train()
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
    return model.eval(), (torch.randn(4, 3, 8, 8),)


def _mixed() -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    return Mixed().eval(), ({"ids": torch.randint(0, 11, (2, 6))}, torch.tensor(1.5))


CASES = {"residual": _residual, "mixed": _mixed}


def _names(prepared: nn.Module) -> set[str]:
    return {name for name, m in prepared.named_modules() if isinstance(m, PreparedWeighted)}


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_exported_program_prepares_as_its_model(case: str, with_example: bool) -> None:
    build: Callable[[], tuple[nn.Module, tuple[Any, ...]]] = CASES[case]
    model, batch = build()
    exported = torch.export.export(model, batch).module()
    example = {"example_inputs": batch} if with_example else {}
    prepared = apot_fx.prepare_apot(exported, "w4a4", **example)
    direct = apot_fx.prepare_apot(model, "w4a4", example_inputs=batch)
    assert _names(prepared) == _names(direct) and not prepared.training
    assert set(model.state_dict()) <= set(prepared.state_dict())
    for stage in (prepared, direct):
        apot_fx.calibrate(stage, [batch], progress=False)
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, [batch]).ok
    with torch.no_grad():
        assert same_bits(converted(*batch), direct(*batch))
        for stage in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(converted))):
            assert same_bits(stage(*batch), converted(*batch))
        prepared.load_state_dict(model.state_dict(), strict=True)
        prepared.apply(apot_fx.disable_fake_quant)
        assert same_bits(prepared(*batch), exported(*batch))


def test_batch_norm_and_dropout_are_live_again() -> None:
    model, (x,) = _residual()
    prepared = apot_fx.prepare_apot(torch.export.export(model, (x,)).module(), "w4a4")
    apot_fx.calibrate(prepared, [(x,)], progress=False)
    prepared.train()
    before = prepared.norm.running_mean.clone()
    first, second = prepared(x), prepared(x)
    assert not torch.equal(first, second) and not torch.equal(before, prepared.norm.running_mean)
    second.sum().backward()
    assert all(p.grad is not None for p in prepared.stem.parameters(recurse=False))


def test_dynamic_batch() -> None:
    model, (x,) = _residual()
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    prepared = apot_fx.prepare_apot(exported, "w4a4")
    other = torch.randn(7, 3, 8, 8)
    apot_fx.calibrate(prepared, [(x,), (other,)], progress=False)
    assert apot_fx.check_parity(prepared, apot_fx.convert_apot(prepared), [(other,)]).ok


def test_the_exported_module_stays_as_it_was() -> None:
    model, batch = _mixed()
    exported = torch.export.export(model, batch).module()
    code, before = exported.code, exported(*batch)
    assert is_exported(exported) and not is_exported(rebuilt(copy.deepcopy(exported)))
    apot_fx.prepare_apot(exported, "w4a4")
    assert exported.code == code and same_bits(exported(*batch), before)


def test_graph_modules() -> None:
    model, batch = _residual()
    traced = fx.symbolic_trace(model)
    prepared = apot_fx.prepare_apot(traced, "w4a4")
    direct = apot_fx.prepare_apot(model, "w4a4")
    for stage in (prepared, direct):
        apot_fx.calibrate(stage, [batch], progress=False)
    assert _names(prepared) == _names(direct)
    assert torch.equal(prepared(*batch), direct(*batch))
