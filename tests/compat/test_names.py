"""Every original module, name and signature is there, and nothing of compat's own is numeric."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import apot_fx.compat

NAMES = {
    "observer": {"APoTObserver": "b k dtype"},
    "quantizer": {
        "APoTQuantizer": "alpha gamma quantization_levels level_indices",
        "quantize_APoT": "tensor2quantize alpha gamma quantization_levels level_indices",
        "dequantize_APoT": "apot_tensor",
        "quant_dequant_APoT": "tensor2quantize alpha gamma quantization_levels level_indices",
    },
    "APoT_tensor": {"TensorAPoT": "quantizer apot_data"},
    "apot_utils": {
        "float_to_apot": "x levels indices alpha",
        "apot_to_float": "x_apot levels indices",
        "quant_dequant_util": "x levels indices",
    },
    "fake_quantize": {"APoTFakeQuantize": "observer observer_kwargs"},
    "fake_quantize_function": {"fake_quantize_function": None},
    "linear": {"LinearAPoT": "weight2quantize b k signed"},
    "qconfig": {
        f"{kind}_qconfig_{bits}bit": None
        for kind in ("uniform", "apot_weight", "apot")
        for bits in (8, 4)
    },
    "adaround_fake_quantize": {
        "AdaroundFakeQuantizer": "observer qscheme quant_min quant_max ch_axis observer_kwargs"
    },
    "adaround_loss": {"AdaptiveRoundingLoss": "max_iter warm_start beta_range reg_param"},
    "adaround_optimization": {
        "AdaptiveRoundingOptimizer": "model callback forward_hook_wrapper data observer max_iter "
        "dtype quant_min quant_max qscheme batch_size feed_forward_wrapper"
    },
}
SOURCES = sorted(Path(apot_fx.compat.__file__).parent.glob("*.py"))
#: What would be a numeric of compat's own, and the files that the issue gives one.
NUMERIC = {"searchsorted", "bucketize", "clamp", "round", "ceil", "floor", "argmin", "abs", "where"}
OWN = {
    "_tables.py": {"searchsorted", "abs"},  # looks levels up, computes none
    "fake_quantize_function.py": {"abs", "where"},  # the mask
    "adaround_fake_quantize.py": {"clamp", "floor"},  # the affine grid
    "linear.py": {"abs", "where"},  # which sums a shift would wrap around
}


@pytest.mark.parametrize("module", NAMES)
def test_modules_names_and_signatures(module: str) -> None:
    found = importlib.import_module(f"apot_fx.compat.{module}")
    for name, parameters in NAMES[module].items():
        thing = getattr(found, name)
        assert getattr(apot_fx.compat, name) is thing and name in apot_fx.compat.__all__
        if parameters is not None:
            assert " ".join(inspect.signature(thing).parameters) == parameters
            assert (thing.__doc__ or "").strip()


def test_all_is_complete() -> None:
    named = {name for names in NAMES.values() for name in names}
    assert set(apot_fx.compat.__all__) == named


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_numeric_of_its_own(path: Path) -> None:
    calls = {
        node.func.attr.rstrip("_")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    }
    assert calls & NUMERIC <= OWN.get(path.name, set())


def test_importing_is_lean() -> None:
    code = "import sys, apot_fx.compat; print([m for m in ('matplotlib', 'sklearn') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
