"""How a batch from a user's loader is passed to a model's forward."""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .errors import CalibrationError, did_you_mean

Forward = Callable[[nn.Module, Any], Any]


def run_batch(model: nn.Module, batch: Any) -> Any:
    """``model(x)`` for a tensor, ``model(**d)`` for a dict, ``model(*t)`` for a tuple or list.

    From a tuple longer than the required parameters only these are passed (the rest is mostly
    labels), or as many as the model was prepared with; that is said once per signature. Raises
    CalibrationError for a batch that the signature does not take.
    """
    if isinstance(batch, torch.Tensor):
        return model(batch)
    signature = inspect.signature(model.forward)
    if isinstance(batch, Mapping):
        _check_keys(batch, signature)
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        known = getattr(model, "apot", None)
        return model(*_required(tuple(batch), signature, getattr(known, "positional", 0)))
    raise CalibrationError(
        f"a batch of type {type(batch).__name__}; a tensor, dict, tuple or list is wanted, "
        "or pass forward=lambda model, batch: …"
    )


def _check_keys(batch: Mapping[str, Any], signature: inspect.Signature) -> None:
    parameters = signature.parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for key in batch:
        if key not in parameters:
            raise CalibrationError(
                f"batch key {key!r} is no argument of forward{signature}."
                f"{did_you_mean(str(key), parameters)} Drop it, or pass forward=lambda model, "
                "batch: …"
            )
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in batch:
            raise CalibrationError(f"batch has no {name!r}, which forward{signature} requires")


_said: set[tuple[str, int]] = set()


def _required(batch: tuple[Any, ...], signature: inspect.Signature, given: int) -> tuple[Any, ...]:
    """What of a tuple is passed: the required parameters, or as many as example_inputs had."""
    parameters = [
        p
        for p in signature.parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        return batch
    count = sum(p.default is p.empty for p in parameters)
    if len(batch) < count:
        raise CalibrationError(
            f"a batch of {len(batch)} members, but forward{signature} requires {count}"
        )
    count = max(count, min(given, len(batch)))
    if len(batch) > count and (str(signature), count) not in _said:
        _said.add((str(signature), count))
        names = ", ".join(p.name for p in parameters[:count])
        warnings.warn(f"batch[{count}:] not passed: forward({names})", stacklevel=6)
    return batch[:count]


def check_batches(batches: Any) -> Iterable[Any]:
    """Refuse what only looks like an iterable of batches; raises CalibrationError."""
    single = isinstance(batches, (torch.Tensor, Mapping, str))
    if single or not hasattr(batches, "__iter__"):
        raise CalibrationError(
            f"batches is one {type(batches).__name__}, but an iterable of batches is wanted; "
            "pass [batch]"
        )
    iterable: Iterable[Any] = batches
    return iterable


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients; every module's mode and the random state come back after."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    python_state = random.getstate()
    try:
        for model in models:
            model.eval()
        with torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        random.setstate(python_state)
        for module, training in modes:
            module.training = training


def run_all(
    model: nn.Module, batches: Iterable[Any], forward: Forward | None
) -> Iterator[tuple[Any, Any]]:
    """``(batch, output)`` of every batch; a failure names the batch. Raises CalibrationError."""
    call = forward or run_batch
    for number, batch in enumerate(check_batches(batches)):
        try:
            result = call(model, batch)
        except CalibrationError as problem:
            raise CalibrationError(f"batch {number}: {problem}") from None
        except Exception as problem:
            what = (
                f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
            )
            raise CalibrationError(
                f"batch {number} does not run through {type(model).__name__}: {what}"
            ) from problem
        yield batch, result
