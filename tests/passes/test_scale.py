"""Deep graphs, and what surrounds tracing: profilers, origins, seeds."""

from __future__ import annotations

import cProfile
import gc
import pstats
import weakref
from typing import Any

import pytest
import torch
from torch import fx, nn

import apot_fx
from apot_fx.graph import free_name
from apot_fx.passes.stage import StageModule, info
from tests.nets import calibrated, mlp, seeded


class Deep(nn.Module):
    """A residual chain, longer than Python's stack is deep."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(400))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        for layer in self.layers:
            if self.in_place:
                x += torch.relu(layer(x))
                x *= 0.5
                x += 1
            else:
                x = x * 0.5 + torch.relu(layer(x)) + 1
        return x


@pytest.mark.parametrize("in_place", [False, True])
def test_long_chains_prepare(in_place: bool) -> None:
    model, x = seeded(lambda: Deep(in_place)), torch.randn(2, 2)
    prepared = apot_fx.prepare_apot(model)
    assert isinstance(prepared, StageModule)
    prepared.apply(apot_fx.disable_observer).apply(apot_fx.disable_fake_quant)
    assert torch.equal(prepared(x), model(x))


def test_a_users_profiler_changes_nothing_and_goes_on() -> None:
    model, _ = mlp()
    profiler = cProfile.Profile()
    profiler.enable()
    prepared = apot_fx.prepare_apot(model)
    apot_fx.presets()
    profiler.disable()
    assert isinstance(prepared, StageModule)
    functions = {name for _, _, name in pstats.Stats(profiler).stats}  # type: ignore[attr-defined]
    assert {"prepare_apot", "presets"} <= functions


class Lines(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(self.body(x))


def test_origins_are_the_users_lines() -> None:
    prepared = apot_fx.prepare_apot(Lines())
    here = "test_scale.py:"
    origins = {n.name: info(n).origin for n in prepared.graph.nodes if n.op != "get_attr"}
    assert origins["sigmoid"].startswith(here) and origins["body_1"].startswith(here)
    alone = apot_fx.prepare_apot(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    assert not any(info(node).origin for node in alone.graph.nodes)


def test_free_names() -> None:
    owner = nn.Module()
    for number in range(70):
        assert free_name(owner, "part") == f"part_{number}"
        owner.add_module(f"part_{number}", nn.Identity())


def test_parameters_read_often_are_one_node() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))
            self.register_buffer("shift", torch.randn(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = nn.functional.linear(x, self.weight) + self.shift
            return nn.functional.linear(x, self.weight) + self.shift

    graph = apot_fx.ApotTracer().trace(Reads())
    assert [n.target for n in graph.nodes if n.op == "get_attr"] == ["weight", "shift"]


def test_parity_queues_no_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = mlp()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)

    def refused(*args: Any) -> None:
        raise AssertionError("torch.manual_seed formats the stack for every idle accelerator")

    monkeypatch.setattr(torch, "manual_seed", refused)
    assert apot_fx.check_parity(prepared, converted, batches).ok


def test_a_graph_is_compiled_once_for_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    recompile = fx.GraphModule.recompile

    def counted(self: fx.GraphModule) -> Any:
        compiled.append(1)
        return recompile(self)

    monkeypatch.setattr(fx.GraphModule, "recompile", counted)
    apot_fx.prepare_apot(mlp()[0])
    assert len(compiled) == 3  # traced, functional, prepared


@pytest.mark.parametrize("with_example", [False, True])
def test_weights_do_not_wait_for_the_garbage_collector(with_example: bool) -> None:
    model, batches = mlp()
    weights = {key: weakref.ref(p) for key, p in model.named_parameters() if p.dim() > 1}
    gc.collect()
    gc.disable()
    try:
        example = batches[0] if with_example else None
        prepared = apot_fx.prepare_apot(model, example_inputs=example, inplace=True)
        apot_fx.calibrate(prepared, batches, progress=False)
        apot_fx.convert_apot(prepared, inplace=True)
        assert [key for key, ref in weights.items() if ref() is not None] == []
    finally:
        gc.enable()
