"""Running the float model beside its graph: how it calls its parts, and whether bits agree."""

from __future__ import annotations

import copy
import dataclasses
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from ..batches import evaluating
from ..errors import GuardError, ModelError, TraceError
from ..fake_quant import FakeQuantize
from ..passes.example import Call
from ..passes.purity import unchanged
from ..values import members, same_bits, tensors_in
from .reads import parameter_reads

#: Random state of every run that is compared.
_SEED = 20
#: So many calls of a module are kept to compare by.
_EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class Calls:
    """How a module is called: a few calls, and whether all had arguments of one kind."""

    examples: tuple[Call, ...]
    alike: bool

    @classmethod
    def of(cls, calls: list[Call]) -> Calls:
        kinds = [_kind_of((call.args, call.kwargs)) for call in calls]
        return cls(tuple(calls[:_EXAMPLES]), all(kind == kinds[0] for kind in kinds))

    @property
    def first(self) -> Calls:
        """The first call alone."""
        return Calls(self.examples[:1], self.alike)


def _kind_of(value: Any) -> Any:
    """What a trace fixes about arguments: their structure, ranks, dtypes and plain values."""
    if isinstance(value, torch.Tensor):
        return "tensor", value.dim(), value.dtype
    parts = members(value)
    if parts:
        return type(value), tuple((name, _kind_of(part)) for name, part in parts)
    return value if isinstance(value, (str, int, float, bool, type(None))) else type(value)


def outputs(model: nn.Module, call: Call) -> Any:
    """What a model gives in eval, without gradients and torch's fused attention, from one seed."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), unchanged(model):
            torch.manual_seed(_SEED)
            own = call.copied()
            return _apart(model(*own.args, **own.kwargs), model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _apart(result: Any, model: nn.Module) -> Any:
    """A result of its own where a forward returns one of its buffers, which are put back."""
    buffers = {id(buffer) for buffer in model.buffers()}
    if not any(id(tensor) in buffers for tensor in tensors_in(result)):
        return result
    return copy.deepcopy(result)


def with_outputs(model: nn.Module, call: Call) -> Call:
    """example_inputs with what the float model gives; its own failure is named as its own."""
    try:
        return dataclasses.replace(call, outputs=outputs(model, call))
    except Exception as problem:
        raise own_failure(model, problem) from problem


def resized(model: nn.Module, call: Call) -> list[Call]:
    """A call with other sizes and what it gives: the first that the float model takes."""
    for other in call.resized():
        with suppress(Exception):
            return [dataclasses.replace(other, outputs=outputs(model, other))]
    return []


def own_failure(model: nn.Module, problem: Exception) -> ModelError:
    """A ModelError that is also what the model raised, where Python can join the two."""
    kind: type[ModelError] = ModelError
    with suppress(TypeError):  # incompatible layouts
        kind = type("ModelError", (ModelError, type(problem)), {"__init__": Exception.__init__})
    frame = traceback.extract_tb(problem.__traceback__)[-1]
    where = f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return kind(
        f"{type(model).__name__}'s own forward fails on example_inputs, before any quantization "
        f"({type(problem).__name__} at {where}: {problem})"
    )


def check_bits(stage: nn.Module, model: nn.Module, calls: Calls) -> None:
    """Raise TraceError unless a graph gives the bits of its model (GuardError: for a guard)."""
    for call in calls.examples:
        try:
            found = outputs(stage, call)
        except GuardError:
            raise
        except Exception as problem:
            raise TraceError(f"its graph fails with {type(problem).__name__}: {problem}") from None
        expected = outputs(model, call) if call.outputs is None else call.outputs
        if not same_bits(expected, found) and same_bits(expected, outputs(model, call)):
            raise TraceError("its graph gives other bits than the model")


@contextmanager
def in_float(prepared: nn.Module) -> Iterator[None]:
    """While open, nothing observes or quantizes."""
    quants = [m for m in prepared.modules() if isinstance(m, FakeQuantize)]
    before = [(quant.observer_enabled, quant.fake_quant_enabled) for quant in quants]
    try:
        for quant in quants:
            quant.observer_enabled = quant.fake_quant_enabled = False
        yield
    finally:
        for quant, (observes, quantizes) in zip(quants, before, strict=True):
            quant.observer_enabled, quant.fake_quant_enabled = observes, quantizes


def calls_inside(model: nn.Module, calls: Calls) -> tuple[dict[str, Calls], dict[str, str]]:
    """What a float model, called so, does with the modules below it, by their path.

    How it calls them, and whose parameters it reads without calling them (``file.py:12``).
    """
    found: dict[str, list[Call]] = {}
    alike: dict[str, bool] = {}
    handles = [
        module.register_forward_pre_hook(_recorder(found, alike, path), with_kwargs=True)
        for path, module in model.named_modules()
        if path
    ]
    try:
        with parameter_reads(model) as reads:
            outputs(model, calls.examples[0])
            for call in calls.examples[1:]:
                with suppress(GuardError):  # a graph that is guarded against these sizes
                    outputs(model, call)
    finally:
        for handle in handles:
            handle.remove()
    return {path: Calls(tuple(calls), alike[path]) for path, calls in found.items()}, reads


def _recorder(
    found: dict[str, list[Call]], alike: dict[str, bool], path: str
) -> Callable[..., None]:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls = found.setdefault(path, [])
        same = not calls or _kind_of((calls[0].args, calls[0].kwargs)) == _kind_of((args, kwargs))
        alike[path] = alike.get(path, True) and same
        if len(calls) < _EXAMPLES or (len(calls) < _EXAMPLES + 1 and not same):
            calls.append(Call(args, kwargs).copied())

    return record
