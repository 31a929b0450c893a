"""Find a user's model and data by ``module:attribute``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from ..errors import ConfigError, did_you_mean


def load(reference: str, what: str) -> Any:
    """The attribute that ``package.module:attribute`` names; the working directory is searched.

    Raises ConfigError, with did-you-mean for the attribute.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"{what}: {reference!r} is not of the form my_module:attribute")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as problem:
        raise ConfigError(
            f"{what}: {problem}; run it where {module_name} can be imported"
        ) from None
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            hint = did_you_mean(part, vars(found))
            raise ConfigError(f"{what}: {module_name} has no {attribute!r}.{hint}")
        found = getattr(found, part)
    return found


def load_model(reference: str) -> Any:
    """A model, or what a callable without arguments builds. Raises ConfigError otherwise."""
    from torch import nn

    found = load(reference, "model")
    if not isinstance(found, nn.Module) and callable(found):
        found = found()
    if not isinstance(found, nn.Module):
        raise ConfigError(f"model: {reference} gives a {type(found).__name__}, not an nn.Module")
    return found


def load_batches(reference: str) -> list[Any]:
    """The batches of an iterable, or of what a callable without arguments gives, as a list."""
    found = load(reference, "--data")
    if not hasattr(found, "__iter__") and callable(found):
        found = found()
    from ..batches import check_batches

    return list(check_batches(found))
