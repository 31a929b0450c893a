"""Models and inputs that can't work: typed errors that name what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import apot_fx
from apot_fx.errors import (
    CalibrationError,
    ConfigError,
    GuardError,
    ModelError,
    StageError,
    TraceError,
)


def body() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + x.reshape(7, 11)


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, x: torch.Tensor) -> Any:
        self.body(x)
        return None


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = body()

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y = self.body(x)
        return y if mask is None else y * mask


def test_a_model_that_fails_fails_as_itself() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ModelError, match=r"Fails's own forward fails.*test_bad_models.py:\d+"):
        apot_fx.prepare_apot(Fails(), example_inputs=x)
    with pytest.raises(RuntimeError):  # also what it raised itself
        apot_fx.prepare_apot(Fails(), example_inputs=x)
    prepared = apot_fx.prepare_apot(Fails())
    with pytest.raises(CalibrationError, match="batch 0 does not run through Fails"):
        apot_fx.calibrate(prepared, [x], progress=False)


def test_example_inputs_that_do_not_fit() -> None:
    with pytest.raises(TraceError, match=r"don.t fit Masked\.forward"):
        apot_fx.prepare_apot(Masked(), example_inputs={"y": torch.randn(3, 4)})


def test_no_tensor_comes_out() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ModelError, match="gives no tensor but a NoneType"):
        apot_fx.prepare_apot(Nothing(), example_inputs=x)
    prepared = apot_fx.prepare_apot(Nothing())
    with pytest.raises(CalibrationError, match="gives no tensor"):
        apot_fx.calibrate(prepared, [x], progress=False)


def test_a_config_that_quantizes_nothing() -> None:
    nothing = apot_fx.QConfigMapping().set_object_type(nn.Linear, None)
    with pytest.raises(ConfigError, match="quantizes nothing"):
        apot_fx.prepare_apot(body(), nothing)
    convolutions = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    with pytest.warns(UserWarning, match="nothing of Sequential is quantized"):
        apot_fx.prepare_apot(convolutions, "w4")


def test_weights_on_several_devices() -> None:
    model = body()
    model[2].to("meta")
    with pytest.raises(StageError, match="meta"):
        apot_fx.prepare_apot(model)


def test_lazy_modules_name_themselves_until_they_have_weights() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(StageError, match="0 is a LazyLinear without weights yet"):
        apot_fx.prepare_apot(model)
    model(torch.randn(2, 4))
    apot_fx.calibrate(apot_fx.prepare_apot(model), [torch.randn(2, 4)], progress=False)


@pytest.mark.parametrize("with_example", [False, True])
def test_batches_whose_structure_changes(with_example: bool) -> None:
    x, mask = torch.randn(3, 4), torch.ones(3, 1)
    example = {"example_inputs": {"x": x}} if with_example else {}
    prepared = apot_fx.prepare_apot(Masked(), **example)
    with pytest.raises(CalibrationError, match=r"batch 1 .*'mask' was traced as None"):
        apot_fx.calibrate(prepared, [{"x": x}, {"x": x, "mask": mask}], progress=False)
    with pytest.raises(GuardError):
        prepared(x, mask)
    kept = apot_fx.prepare_apot(Masked(), example_inputs={"x": x, "mask": mask})
    apot_fx.calibrate(kept, [{"x": x, "mask": mask}], progress=False)


def test_a_layer_that_never_ran_is_named_everywhere() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.rare = body(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rare(x) if x.sum() > 1e6 else self.body(x)

    prepared = apot_fx.prepare_apot(Sometimes())
    x = torch.randn(3, 4)
    apot_fx.calibrate(prepared, [x], progress=False)
    assert "saw no finite value" in str(apot_fx.explain(prepared, "rare").rows[0]["why"])
    with pytest.raises(
        CalibrationError, match=r"rare \(its activation_post_process never saw a finite value\)"
    ):
        apot_fx.convert_apot(prepared)
    apot_fx.calibrate(prepared, [x, x + 1e6], progress=False)
    converted = apot_fx.convert_apot(prepared)
    assert apot_fx.check_parity(prepared, converted, [x, x + 1e6]).ok
    missing = apot_fx.check_parity(prepared, converted, [x])
    assert not missing.ok and missing.uncovered == ["rare"]


def test_what_is_no_plain_module_is_named() -> None:
    model, x = body().eval(), torch.randn(2, 4)
    with pytest.raises(StageError, match="wants an nn"):
        apot_fx.prepare_apot("model")  # type: ignore[arg-type]
    with pytest.raises(StageError, match=r"pass program\.module\(\)"):
        apot_fx.prepare_apot(torch.export.export(model, (x,)))  # type: ignore[arg-type]
    with pytest.raises(StageError, match="not a TopLevelTracedModule"):
        apot_fx.prepare_apot(torch.jit.trace(model, x))
    with pytest.warns(UserWarning, match=r"torch\.compile's module is prepared"):
        apot_fx.prepare_apot(torch.compile(model, backend="eager"))
