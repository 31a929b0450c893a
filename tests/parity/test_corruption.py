"""Parity must be able to fail: everything a converted model holds is corrupted and found."""

from __future__ import annotations

import operator

import pytest
import torch

import apot_fx
from apot_fx.levels import LevelSet
from apot_fx.nn import ConvertedLayer, Quantize
from apot_fx.passes.stage import StageModule
from tests.nets import branches, calibrated, mlp

CONFIG = apot_fx.QConfig(apot_fx.WeightSpec(4), apot_fx.ActivationSpec(4, residual=8))


@pytest.fixture(scope="module", params=["branches", "mlp", "residual"])
def stages(request: pytest.FixtureRequest) -> tuple[StageModule, list[torch.Tensor]]:
    model, batches = mlp() if request.param == "mlp" else branches()
    config = CONFIG if request.param == "residual" else "w4a4"
    return calibrated(model, batches, config), batches


def flip(tensor: torch.Tensor, place: int) -> None:
    """Change one element by one bit, or one ULP, behind torch's back (NumPy)."""
    flat = tensor.detach().reshape(-1).numpy()
    if tensor.dtype == torch.float32:
        flat.view("int32")[place] ^= 1
    elif tensor.dtype == torch.uint8:
        flat[place] ^= 1
    else:
        flat[place] += 1


def test_every_stored_tensor(stages: tuple[StageModule, list[torch.Tensor]]) -> None:
    prepared, batches = stages
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, batches).ok
    for name, tensor in converted.state_dict().items():
        for place in {0, tensor.numel() - 1}:
            before = tensor.clone()
            flip(tensor, place)
            verdict = apot_fx.check_parity(prepared, converted, batches[:1])
            assert not verdict.ok and verdict.status == "differs", name
            assert name in str(verdict), f"{name} is not named in: {verdict}"
            with torch.no_grad():
                tensor.copy_(before)
    assert apot_fx.check_parity(prepared, converted, batches).ok


def test_names_the_layer_and_the_distance() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    flip(converted.get_submodule("left").s, 3)
    finding = apot_fx.check_parity(prepared, converted, batches).failures[0]
    assert (finding.where, finding.layer, finding.differing, finding.ulp) == (
        "left.s",
        "left",
        1,
        1,
    )


def test_running_finds_what_differs_first() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    with torch.no_grad():
        converted.get_submodule("left").b += 0.5
    nodes = [f for f in apot_fx.check_parity(prepared, converted, batches).nodes if not f.ok]
    assert nodes[0].layer == "left" and nodes[0].differing and nodes[0].steps >= 1


def test_graph_edge() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    add = next(node for node in converted.graph.nodes if node.target is operator.add)
    add.args = (add.args[1], add.args[1])
    converted.recompile()
    verdict = apot_fx.check_parity(prepared, converted, batches)
    assert not verdict.ok and "graph differs" in str(verdict) and add.name in str(verdict)


def test_graph_edge_that_breaks_the_run() -> None:
    model, batches = mlp()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    last = next(n for n in converted.graph.nodes if n.target == "middle")
    placeholder = next(iter(converted.graph.nodes))
    last.args = (placeholder, *last.args[1:])
    converted.recompile()
    verdict = apot_fx.check_parity(prepared, converted, batches)
    assert not verdict.ok
    assert any("fails with" in finding.problem for finding in verdict.nodes)


@pytest.mark.parametrize("kind", [ConvertedLayer, Quantize])
def test_level_table(kind: type) -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    name, module = next((n, m) for n, m in converted.named_modules() if type(m) is kind)
    other = LevelSet(sorted({*range(-40, 41)}))
    if isinstance(module, ConvertedLayer):
        module.weight.level_set = other
        name += ".weight"
    else:
        module.level_set, module.level_spec = other, other.spec
    verdict = apot_fx.check_parity(prepared, converted, batches)
    assert not verdict.ok and name in str(verdict)


def test_wide_flag_and_product() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    layer = converted.get_submodule("left")
    layer.wide = not layer.wide
    assert "left" in str(apot_fx.check_parity(prepared, converted, batches))


def test_stale_decoded_weights_do_not_hide_corruption() -> None:
    model, batches = branches()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    converted(batches[0])
    converted.get_submodule("join").weight.packed.data[5] ^= 16
    assert not apot_fx.check_parity(prepared, converted, batches).ok


def test_raise_if_failed() -> None:
    model, batches = mlp()
    prepared = calibrated(model, batches)
    converted = apot_fx.convert_apot(prepared)
    verdict = apot_fx.check_parity(prepared, converted, batches)
    assert verdict.raise_if_failed() is verdict
    flip(converted.get_submodule("middle").b, 0)
    with pytest.raises(AssertionError, match=r"middle\.b"):
        apot_fx.check_parity(prepared, converted, batches).raise_if_failed()
