"""Operators survive opcheck, tracing, export, compile and a .pt2 round trip."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

import apot_fx
from apot_fx import LevelSet

SPEC, OPS = LevelSet.apot(4).spec, torch.ops.apot_fx


def samples() -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator, a channels-last one among them."""
    x = torch.randn(2, 4, 5, 6)
    last = x.to(memory_format=torch.channels_last)
    one, four = torch.tensor(1.5), torch.rand(4) + 0.5
    groups = torch.rand(4, 8) + 0.5
    index = OPS.quantize(x, one, SPEC)
    index_last = index.to(memory_format=torch.channels_last)
    w, s, b = torch.randint(-9, 9, (4, 2, 3, 3)).float(), torch.rand(4), torch.randn(4)
    levels = torch.randint(0, 9, (2, 4, 5, 6)).float()
    geometry = ([1, 2], [1, 1], [1, 1], 2)
    turned = ([1, 2], [1, 1], [0, 1], [1, 1], 2)
    flat, fw = torch.randint(0, 9, (3, 20)).float(), torch.randint(-9, 9, (4, 20)).float()
    where: list[tuple[Any, ...]] = [
        (one, SPEC), (four, SPEC, 1), (groups, SPEC, 1, 8),
    ]  # fmt: skip
    both = [(x, *rest) for rest in where] + [(last, *rest) for rest in where]
    return {
        "quantize": [*both, (x[:, ::2].transpose(0, 1), one, SPEC), (x[:0], one, SPEC)],
        "dequantize": [(index, *where[1]), (index_last, *where[0]), (index, *where[2])],
        "fake_quantize": [*both, (x.bfloat16(), one, SPEC, None, None, "ste", True)],
        "fake_quantize_backward": [
            (x, last, one, SPEC, None, None, "rcf"), (x, x, groups, SPEC, 1, 8, "rcf"),
            (x, x, four, SPEC, 1, None, "ste"),
        ],
        "levels": [(index, SPEC), (index_last, SPEC)],
        "to_levels": [(x, one, SPEC), (last, four, SPEC, 1)],
        "pack": [(index, 4), (index.short(), 11)],
        "unpack": [(OPS.pack(index, 4), 4, [2, 4, 5, 6]), (OPS.pack(index, 9), 9, [240])],
        "linear": [(flat, fw, s, b, False), (flat[0], fw, s, b, True)],
        "matmul": [
            (levels, levels.transpose(2, 3), one, False), (flat[0], flat[1], one, True),
            (flat, fw.t(), one, False),
        ],
        "einsum": [
            (levels, levels, one, "bhid,bhjd->bhij", False), (flat, fw, one, "ij,kl->il", True),
        ],
        "linear_grouped": [(flat, fw, torch.rand(4, 3), b, 8, False)],
        "linear_weight_only": [(flat, fw, torch.rand(4, 2), b, 16), (flat, fw, s, b, 20)],
        "conv": [
            (levels, w, s, b, *geometry, False),
            (levels.to(memory_format=torch.channels_last), w, s, b, *geometry, False),
            (levels[0], w, s, b, *geometry, True),
            (levels[:, :, 0], w[:, :, 0], s, b, [1], [1], [2], 2, False),
        ],
        "conv_grouped": [(levels, w, torch.rand(4, 3), b, *geometry, 8, False)],
        "conv_transpose": [
            (levels, w, s, b, *turned, False),
            (levels.to(memory_format=torch.channels_last), w, s, b, *turned, True),
            (levels[0], w, s, b, *turned, False),
            (levels[:, :, 0], w[:, :, 0], s, b, [2], [1], [1], [2], 2, False),
        ],
        "conv_transpose_grouped": [(levels, w, torch.rand(4, 3), b, *turned, 8, False)],
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(samples()))
def test_opcheck(name: str) -> None:
    for args in samples()[name]:
        torch.library.opcheck(getattr(OPS, name).default, args)


def test_opcheck_with_gradients() -> None:
    x, alpha = torch.randn(4, 6, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    torch.library.opcheck(OPS.fake_quantize.default, (x, alpha, SPEC, None, None, "rcf"))
    index = OPS.quantize(x.detach(), torch.tensor(1.0), SPEC)
    torch.library.opcheck(OPS.dequantize.default, (index, alpha, SPEC))


class Round(nn.Module):
    """Everything the public functions do, in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = LevelSet.apot(4)
        self.alpha = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        index = apot_fx.quantize(x, 0.9, self.levels)
        y = apot_fx.dequantize(index, 0.9, self.levels)
        return y + apot_fx.fake_quantize(x, self.alpha, self.levels, 1, grad="rcf")


def test_symbolic_trace() -> None:
    model, x = Round(), torch.randn(3, 6)
    traced = torch.fx.symbolic_trace(model)
    assert any("apot_fx" in str(node.target) for node in traced.graph.nodes)
    assert torch.equal(traced(x), model(x))


def test_export_and_pt2_round_trip() -> None:
    model, x = Round(), torch.randn(3, 6)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    more = torch.randn(7, 6)
    assert torch.equal(loaded(more), model(more))


def test_converted_model_exports() -> None:
    from tests.nets import branches, calibrated

    model, batches = branches()
    converted = apot_fx.convert_apot(calibrated(model, batches))
    program = torch.export.export(converted, (batches[0],))
    assert torch.equal(program.module()(batches[0]), converted(batches[0]))


@pytest.mark.slow
def test_compile_fullgraph_forward_and_backward() -> None:
    model, x = Round(), torch.randn(3, 6)
    compiled = torch.compile(model, fullgraph=True)
    expected, found = model(x), compiled(x)
    assert torch.equal(expected, found)
    (grad,) = torch.autograd.grad(expected.square().sum(), [model.alpha])
    (other,) = torch.autograd.grad(found.square().sum(), [model.alpha])
    assert torch.allclose(grad, other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prepared", "converted"])
def test_stages_compile_fullgraph(kind: str) -> None:
    from tests.nets import branches, calibrated

    model, batches = branches()
    prepared = calibrated(model, batches)
    stage = prepared if kind == "prepared" else apot_fx.convert_apot(prepared)
    with torch.no_grad():
        compiled = torch.compile(stage, fullgraph=True)(batches[0])
    assert compiled.shape == stage(batches[0]).shape
    assert torch.isfinite(compiled).all()
