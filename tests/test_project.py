"""Habits that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "apot_fx").rglob("*.py"))
HEAVY = (
    "matplotlib",
    "onnx",
    "onnxruntime",
    "transformers",
    "timm",
    "sklearn",
    "tabulate",
    "pandas",
)


def test_importing_is_lean() -> None:
    code = f"import sys, apot_fx; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom apot_fx.cli import parser\nparser()"
    path = f"import types; sys.modules['apot_fx'] = p = types.ModuleType('apot_fx'); p.__path__ = [{str(ROOT / 'apot_fx')!r}]"  # noqa: E501
    subprocess.run([sys.executable, "-c", f"import sys; {path}\n{code}"], check=True)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sources(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not any(n.startswith(("torch.ao", "torchao")) for n in names)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno - len(ast.get_docstring(node) or "") // 60
            assert length <= 60, f"{node.name} is {length} lines long"


def test_public_names_have_docstrings_and_exist() -> None:
    import apot_fx

    for name in apot_fx.__all__:
        assert (getattr(apot_fx, name).__doc__ or "").strip(), name
