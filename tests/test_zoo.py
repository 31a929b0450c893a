"""A sample of the coverage benchmark: models of timm, torchvision and transformers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SAMPLE = {
    "timm": ("timm/test_byobnet", "timm/mobilenetv3_small", "timm/levit", "timm/edgenext"),
    "torchvision": ("torchvision/resnet18", "torchvision/shufflenet", "torchvision/swin_t"),
    "transformers": (
        "transformers/BertModel",
        "transformers/LlamaFor",
        "transformers/T5Model",
        "transformers/WhisperModel",
        "transformers/Mixtral",
        "transformers/SwinModel",
        "transformers/GPT2",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", SAMPLE)
def test_sample_of_coverage(family: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(family) is None:
        pytest.skip(f"{family} is not installed: make test-slow installs it")
    report = tmp_path / "coverage.json"
    only = [part for name in SAMPLE[family] for part in ("--only", name)]
    command = [sys.executable, "benchmarks/coverage.py", "--family", family, *only]
    done = subprocess.run(
        [*command, "--json", str(report)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(report.read_text())["models"]
    assert len(rows) == len(SAMPLE[family])
    for row in rows:
        assert row["problem"] == "" and row["bits"] == 0, row
        assert row["macs"] >= 0.99, row
