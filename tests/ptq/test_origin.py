"""What tells one run from another: everything that can be seen, and nothing that may differ."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from apot_fx.batches import run_batch
from apot_fx.ptq.learn import Settings
from apot_fx.ptq.origin import Origin

SETTINGS = Settings(steps=1, batch_size=1, seed=0)


def origin(
    model: nn.Module | None = None, batch: Any = None, forward: Callable[..., Any] = run_batch
) -> Origin:
    return Origin.of(SETTINGS, model or nn.Identity(), [batch], forward)


@dataclasses.dataclass
class Item:
    value: Any


class Slots:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


X = torch.arange(4.0)
DIFFERENT: dict[str, tuple[Any, Any]] = {
    "number": (1, 2),
    "kind of number": (1, 1.0),
    "text": ("a", "b"),
    "key": ({"a": X}, {"b": X}),
    "class": ({"value": X}, Item(X)),
    "order": ([X, 1], [1, X]),
    "grouping": ([[1], [2]], [[1, 2], []]),
    "member": (Item(1), Item(2)),
    "slot": (Slots(1), Slots(2)),
    "set": ({1, 2}, {1, 3}),
    "bits": (X, X + torch.tensor([0, 0, 0, 1e-6])),
    "sign of zero": (torch.zeros(1), -torch.zeros(1)),
    "dtype": (torch.zeros(1), torch.zeros(1, dtype=torch.int32)),
    "shape": (X, X.view(2, 2)),
    "layout": (X, X.to_sparse()),
    "array": (X.numpy(), X.numpy() + 1),
    "long array": (torch.zeros(5000).numpy(), (torch.arange(5000) == 2500).float().numpy()),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_batches_differ(name: str) -> None:
    one, other = (origin(batch=value).batches for value in DIFFERENT[name])
    assert one != other


def test_other_forwards_differ_and_where_they_stand_does_not_matter() -> None:
    def doubled(model: nn.Module, batch: Any) -> Any:
        return model(batch * 2)

    class Callable_:
        def __call__(self, model: nn.Module, batch: Any) -> Any:
            return model(batch * 2)

        def method(self, model: nn.Module, batch: Any) -> Any:
            return model(batch * 4)

    forwards = [run_batch, doubled, lambda m, b: m(b * 3), Callable_().method, max, min]
    assert len({origin(forward=forward).forward for forward in forwards}) == len(forwards)
    same = [
        doubled,
        functools.partial(doubled),
        torch.no_grad()(doubled),
        lambda model, batch: model(batch * 2),
    ]
    assert len({origin(forward=forward).forward for forward in same}) == 1
    assert origin(forward=Callable_()).forward == origin(forward=Callable_()).forward


def test_other_models_of_the_same_state_differ() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    class Plus(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 2

    Plus.__name__ = Plus.__qualname__ = "Twice"
    models = [nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), Twice(), Plus()]
    assert len({origin(nn.Sequential(model)).model for model in models}) == len(models)


SCRIPT = """
import torch
from tests.ptq.test_origin import Item, origin
def forward(model, batch):
    return model(batch) if batch in {"one", "two", "three"} else (lambda: 2)()
print(origin(batch=[Item({"a", "b", "c"}), torch.ones(2), forward, object()], forward=forward))
"""


def test_every_process_sees_the_same() -> None:
    root, found = str(Path(__file__).parents[2]), set()
    for seed in "12":
        environment = {**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", SCRIPT]
        found.add(subprocess.check_output(command, env=environment, cwd=root, text=True))
    assert len(found) == 1
