"""In-place programs, hand-made and random, against eager, bit for bit."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import nn

from apot_fx.errors import GrammarError
from apot_fx.passes.base import run_passes
from apot_fx.passes.functionalize import Functionalize, is_functional
from apot_fx.passes.stage import StageModule
from apot_fx.passes.trace import trace

Program = Callable[[Any, torch.Tensor], Any]


def relu_through_view(self: Any, x: torch.Tensor) -> Any:
    y = x * 2
    v = y.view(-1)
    y.relu_()
    return v + 1, y


def slice_add(self: Any, x: torch.Tensor) -> Any:
    y = x + 1
    v = y[:, :2]
    v += 3
    return y, v


def set_items(self: Any, x: torch.Tensor) -> Any:
    y = x + 1
    y[:, 1] = 0
    y[0] *= 2
    y[x > 0] = 5
    return y


def chunks(self: Any, x: torch.Tensor) -> Any:
    y = x.clone()
    a, b = y.chunk(2, 1)
    a.add_(1)
    b.mul_(a)
    return y, a, b


def module_twice(self: Any, x: torch.Tensor) -> Any:
    y = self.relu(x * 1)
    z = self.relu(y - 1)
    return y, z


def identity_alias(self: Any, x: torch.Tensor) -> Any:
    y = x * 1
    i = self.identity(y)
    i += 1
    return y, functional.relu(i, inplace=True), y


def residual(self: Any, x: torch.Tensor) -> Any:
    shortcut = x * 1
    out = self.relu(shortcut)  # writes into what shortcut reads
    out += shortcut
    return self.relu(out) + shortcut


def view_of_view(self: Any, x: torch.Tensor) -> Any:
    y = x * 1
    w = y.transpose(0, 1)[1:]
    w.zero_()
    y += 1
    w.copy_(w * 3 + 1)
    return y, w


def argument(self: Any, x: torch.Tensor) -> Any:
    x += 1
    return x * 2


def expand(self: Any, x: torch.Tensor) -> Any:
    y = x * 1
    z = y.expand(3, 4, 6)
    y.sub_(1)
    return z.sum(0)


def fill(self: Any, x: torch.Tensor) -> Any:
    y = torch.relu_(x * 1)
    z = y.t()
    y.fill_(2.0)
    return z


def numbers(self: Any, x: torch.Tensor) -> Any:
    total: Any = 0
    total += x
    total += x
    n = x.size(0)
    n += 1
    return total * n


def pooled_inplace(self: Any, x: torch.Tensor) -> Any:
    y = (x * 1).reshape(2, -1)
    y.relu_()
    return y + 1


def later_reshape(self: Any, x: torch.Tensor) -> Any:
    y = x * 1
    y.relu_()
    return y.reshape(-1) + y.flatten().sum()


def logic(self: Any, x: torch.Tensor) -> Any:
    """``operator.or_`` and ``and_`` end in an underscore and write nothing."""
    low, high = x < 0.5, x > -0.5
    either = low & high | (x > 1)
    either |= low
    return x * either + high


FUNCTIONAL = [
    relu_through_view, slice_add, set_items, chunks, module_twice, identity_alias, residual,
    view_of_view, argument, expand, fill, numbers, pooled_inplace, later_reshape, logic,
]  # fmt: skip


def perhaps_alias(self: Any, x: torch.Tensor) -> Any:
    y = x * 1
    z = y.flatten(1)
    y.relu_()
    return z, y


def dropout_alias(self: Any, x: torch.Tensor) -> Any:
    y = x * 1
    z = self.dropout(y)
    y += 1
    return y + z


def out_argument(self: Any, x: torch.Tensor) -> Any:
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    return y * 2


def buffer_counter(self: Any, x: torch.Tensor) -> Any:
    self.count.add_(1)
    return x + self.count


KEPT = [perhaps_alias, dropout_alias, out_argument, buffer_counter]


class Runs(nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.relu, self.identity = nn.ReLU(inplace=True), nn.Identity()
        self.dropout = nn.Dropout()
        self.register_buffer("count", torch.zeros(4, 6))

    def forward(self, x: torch.Tensor) -> Any:
        return self.program(self, x)


def compare(program: Program, shape: tuple[int, ...] = (4, 6)) -> StageModule:
    model, x = Runs(program).eval(), torch.randn(*shape)
    expected = copy.deepcopy(model)(x.clone())
    stage = run_passes(trace(copy.deepcopy(model)), [Functionalize()])
    found = stage(x.clone())
    pairs = (expected, found) if isinstance(expected, tuple) else ((expected,), (found,))
    for mine, theirs in zip(*pairs, strict=True):
        assert torch.equal(mine, theirs), stage.graph
    return stage


@pytest.mark.parametrize("program", FUNCTIONAL)
def test_same_bits_and_nothing_left(program: Program) -> None:
    stage = compare(program)
    assert not stage.apot.reports[-1].left
    assert not any(node.meta.get("keep") for node in stage.graph.nodes)


@pytest.mark.parametrize("program", KEPT)
def test_what_cannot_be_proved_stays_with_a_reason(program: Program) -> None:
    stage = compare(program)
    assert stage.apot.reports[-1].left
    assert any(node.meta.get("pinned") for node in stage.graph.nodes)


def test_inplace_batch_norm_relu_residual_stays_quantizable() -> None:
    """The common residual block leaves nothing in place."""
    from apot_fx.demo.models import ResidualNet

    stage = run_passes(trace(ResidualNet().eval()), [Functionalize()])
    assert not stage.apot.reports[-1].left


def test_the_invariant_can_fail() -> None:
    stage = trace(Runs(argument))
    with pytest.raises(GrammarError, match="writes in place"):
        is_functional(stage)


VIEWS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda t: t.view(-1),
    lambda t: t.transpose(0, -1),
    lambda t: t[..., :2],
    lambda t: t[1:],
    lambda t: t.unsqueeze(0),
    lambda t: t.chunk(2, -1)[0],
    lambda t: t.select(0, 0),
    lambda t: t.narrow(0, 0, 1),
]
WRITES: list[Callable[[torch.Tensor, torch.Tensor], Any]] = [
    lambda t, o: t.relu_(),
    lambda t, o: t.add_(0.5),
    lambda t, o: t.mul_(o.sum()),
    lambda t, o: t.__setitem__(0, 0.25),
    lambda t, o: t.__iadd__(1),
    lambda t, o: t.clamp_(min=-0.3),
    lambda t, o: functional.hardtanh_(t),
    lambda t, o: t.copy_(t * 2),
]


def random_program(seed: int) -> Program:
    """Views, writes and reads of a few tensors; view(-1) only where eager allows it."""

    def program(self: Any, x: torch.Tensor) -> Any:
        draw = random.Random(seed)
        values = [x * 1.0, x + 1.0]
        for _ in range(draw.randint(3, 10)):
            kind, value = draw.random(), draw.choice(values)
            if kind < 0.45:
                values.append(draw.choice(VIEWS)(value))
            elif kind < 0.85:
                draw.choice(WRITES)(value, draw.choice(values))
            else:
                values.append(value * 3.0)
        return tuple(values)

    return program


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_random_programs(start: int) -> None:
    done = 0
    for seed in range(start, start + 50):
        program = random_program(seed)
        try:  # a view of an impossible shape: not a program
            program(None, torch.randn(4, 6))
        except (RuntimeError, IndexError):
            continue
        stage = compare(program)
        assert not stage.apot.reports[-1].left
        done += 1
    assert done > 10
