"""The differential tests once more on kernels that watch every access and every undefined step."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = "-O1 -g -std=c11 -ffp-contract=off -fPIC -shared -fsanitize=address,undefined".split()
TESTS = "shapes or strides or lengths or floats or ties or nan or threads or ends or histogram or"
TESTS += " following or packing or packed"


def runtime(name: str) -> str:
    """Where gcc has a sanitizer's runtime; "" where it has none."""
    if sys.platform != "linux" or shutil.which("gcc") is None:
        return ""
    command = ["gcc", f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return path if Path(path).is_absolute() else ""


@pytest.mark.slow
@pytest.mark.skipif(not runtime("libasan.so"), reason="needs gcc with its sanitizers, on Linux")
def test_no_bad_access_and_nothing_undefined(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for part in ("apot_fx", "tests"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=ignored)
    native = tmp_path / "apot_fx" / "kernels" / "native"
    library = native / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [str(path) for path in sorted(native.glob("*.c"))]
    warnings = ["-Wall", "-Wextra", "-Wno-psabi", "-Werror", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", *FLAGS, *warnings, *sources, "-o", str(library)], check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so"))),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own, at its end
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": str(tmp_path),
    }
    tests = str(tmp_path / "tests" / "kernels" / "test_native.py")
    options = "-q -p no:cacheprovider -p no:xdist --import-mode=importlib".split()
    command = [sys.executable, "-m", "pytest", *options, "-m", "not slow", "-k", TESTS, tests]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout
