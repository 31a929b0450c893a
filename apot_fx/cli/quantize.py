"""Prepare, calibrate and convert a model of yours, check parity, and write the results."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ..errors import ConfigError


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="my_module:build_model, a model or what builds it")
    command.add_argument("--data", required=True, help="my_module:batches, or what gives them")
    command.add_argument("--config", default="w4a4", help="a preset (default w4a4)")
    command.add_argument("-o", "--output", required=True, type=Path, help="folder to write")
    command.add_argument("--force", action="store_true", help="replace a folder that is there")


def run(options: argparse.Namespace) -> int:
    from .. import api
    from .loading import load_batches, load_model

    _check_output(options.output, options.force)
    model, batches = load_model(options.model).eval(), load_batches(options.data)
    prepared = api.prepare_apot(model, options.config)
    api.calibrate(prepared, batches)
    converted = api.convert_apot(prepared)
    verdict = api.check_parity(prepared, converted, batches)
    tables = {"explain": api.explain(prepared), "summary": api.summary(converted)}
    texts = {name: table.to_json() for name, table in tables.items()}
    texts["parity"] = verdict.to_json()
    _write(options.output, texts, converted.state_dict())
    if options.json:
        print(verdict.to_json())
    else:
        for table in tables.values():
            print(f"{table}\n")
        print(verdict)
        print(f"written: {options.output}")
    return 0 if verdict.ok else 1


def _check_output(output: Path, force: bool) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigError(f"-o {output}: is a file; name a folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise ConfigError(f"-o {output}: is not empty; choose another folder, or --force")


def _write(output: Path, texts: dict[str, str], state: dict[str, Any]) -> None:
    """Write everything beside the folder first, so that it is whole or not there."""
    import torch

    output.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        for name, text in texts.items():
            (beside / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        torch.save(state, beside / "state_dict.pt")
        beside.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        beside.rename(output)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
