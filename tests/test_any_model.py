"""Whatever runs in eager mode prepares, runs, converts, and agrees bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn
from torch.utils.checkpoint import checkpoint

import apot_fx
from apot_fx.fake_quant import FakeQuantize


def _body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(8, 8), _body(), nn.Linear(8, 3)


class DataDependent(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        x = self.body(x) if x.sum() > 0 else self.body(-x)
        while x.abs().max() > 100:
            x = x / 2
        return self.last(x)


class DecidesInside(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = DataDependent()
        self.inner.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.inner(torch.relu(self.first(x)))))


class BatchSize(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.shape[0] > 3:
            x = torch.relu(x)
        for row in range(x.size(0)):
            x = x + row
        return self.last(self.body(x))


class Variadic(Base):
    def forward(self, *args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        x = sum(args) * kwargs.get("scale", 1.0)
        return self.last(self.body(self.first(x)))


_scale = 1.0
_seen: list[int] = []


class GlobalState(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global _scale
        _scale = 2.0 if _scale == 1.0 else 1.0
        _seen.append(len(x))
        return self.last(self.body(self.first(x) * _scale / _scale))


class SetsAttributes(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.features = self.body(self.first(x))
        self.calls = getattr(self, "calls", 0) + 1
        return self.last(self.features)


class RandomState(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.first(x) * (1 + 0 * random.random())))


class Closures(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps = [self.first, lambda y: torch.relu(y), self.body]

        def run(y: torch.Tensor) -> torch.Tensor:
            for step in steps:
                y = step(y)
            return y

        return self.last(run(x))


class TwoNames(Base):
    def __init__(self) -> None:
        super().__init__()
        self.alias = self.first
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.relu(self.alias(self.relu(self.first(x)))))


def _instance_forward() -> nn.Module:
    model = Base()

    def forward(self: Base, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.first(x)))

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    return model


class ScaledLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight * 0.5, self.bias) + 1


class Subclass(Base):
    def __init__(self) -> None:
        super().__init__()
        self.own = ScaledLinear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.own(self.first(x))))


class Generators(Base):
    def _parts(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for layer in (self.first, self.body):
            x = layer(x)
            yield x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.stack(list(self._parts(x))).sum(0))


class Catches(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            big = bool(x.sum() > 0)
        except Exception:
            big = False
        with contextlib.suppress(TypeError):
            x = x[[int(n) for n in range(len(x))]]
        return self.last(self.body(self.first(x)) * (2.0 if big else 0.5))


class Checkpointed(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.first, x, use_reentrant=False)
        x = checkpoint(lambda y: self.body(y), x, use_reentrant=False)
        return self.last(x)


@dataclasses.dataclass
class Result:
    logits: torch.Tensor
    extra: dict[str, Any]


class Structured(Base):
    def forward(self, x: dict[str, torch.Tensor], flag: bool = True, n: int = 2) -> Result:
        y = self.body(self.first(x["a"] + x["b"]))
        return Result(self.last(y * n), {"flag": flag, "pair": (y, [y + 1])})


class Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.list = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.dict = nn.ModuleDict({"out": nn.Linear(8, 3), "act": nn.ReLU()})

    def forward(self, x: torch.Tensor, which: str = "act") -> torch.Tensor:
        for layer in self.list:
            x = self.dict[which](layer(x))
        return self.dict["out"](x)


class InPlace(Base):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        view = y[:, :4]
        view.relu_()
        y += 1
        y[:, 0] = 0
        return self.last(self.body(y).mul_(2))


class ReadsWeights(Base):
    """Its middle layer is never called; and which way it goes is decided by data."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = nn.Linear(8, 8)
        del self.body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if x.sum() > 1e9:
            return x
        return self.last(functional.linear(x, self.middle.weight.abs(), self.middle.bias))


def _hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model[2].register_forward_hook(lambda module, args, result: result * 2)
    model[4].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


def _old_weight_norm() -> nn.Module:
    model = Base()
    model.middle = nn.utils.weight_norm(nn.Linear(8, 8))  # type: ignore[no-untyped-call]

    class Normed(Base):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))

    model.__class__ = Normed
    return model


def _parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.utils.parametrizations.weight_norm(model[2])
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


def _x() -> torch.Tensor:
    return torch.randn(4, 8)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "data-dependent": (DataDependent, _x),
    "decides inside": (DecidesInside, _x),
    "batch size": (BatchSize, _x),
    "args and kwargs": (Variadic, lambda: (_x(), _x())),
    "global state": (GlobalState, _x),
    "sets attributes": (SetsAttributes, _x),
    "random state": (RandomState, _x),
    "closures": (Closures, _x),
    "two names": (TwoNames, _x),
    "forward on the instance": (_instance_forward, _x),
    "linear subclass": (Subclass, _x),
    "generators": (Generators, _x),
    "try and except": (Catches, _x),
    "checkpoint": (Checkpointed, _x),
    "dict in, dataclass out": (Structured, lambda: ({"a": _x(), "b": _x()},)),
    "containers": (Containers, _x),
    "in place": (InPlace, _x),
    "reads weights": (ReadsWeights, _x),
    "hooks": (_hooked, _x),
    "old weight_norm": (_old_weight_norm, _x),
    "parametrized": (_parametrized, _x),
}


def _tensors(value: Any) -> list[torch.Tensor]:
    from apot_fx.values import tensors_in

    return tensors_in(value)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _other_size(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return torch.cat([batch, batch])[:7]
    if isinstance(batch, dict):
        return {key: _other_size(value) for key, value in batch.items()}
    return tuple(_other_size(part) for part in batch)


@pytest.mark.parametrize("with_example", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_prepares_runs_and_agrees(name: str, with_example: bool) -> None:
    build, make = MODELS[name]
    torch.manual_seed(0)
    model, batches = build().eval(), [make() for _ in range(3)]
    batches.append(_other_size(batches[0]))
    example = {"example_inputs": batches[0]} if with_example else {}
    keys = set(model.state_dict())
    prepared = apot_fx.prepare_apot(model, "w4a4", **example)
    quantizers = [n for n, m in prepared.named_modules() if isinstance(m, FakeQuantize)]
    assert quantizers
    assert keys <= set(prepared.state_dict())
    apot_fx.calibrate(prepared, batches, progress=False)
    converted = apot_fx.convert_apot(prepared)
    verdict = apot_fx.check_parity(prepared, converted, batches)
    assert verdict.ok, verdict
    assert str(apot_fx.explain(prepared)) and str(apot_fx.summary(converted))
    for batch in batches:
        for mine, theirs in zip(
            _tensors(_call(prepared, batch)), _tensors(_call(converted, batch)), strict=True
        ):
            assert torch.equal(mine, theirs)
    prepared.apply(apot_fx.disable_fake_quant)
    for batch in batches:
        floats, found = _tensors(_call(model, batch)), _tensors(_call(prepared, batch))
        assert len(floats) == len(found)
        assert all(torch.equal(a, b) for a, b in zip(floats, found, strict=True))
