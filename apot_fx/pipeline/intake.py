"""What prepare is given: exported and compiled modules become models like any other."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..errors import StageError, TraceError
from ..graph import copy_of, is_kind, substitute
from ..passes.example import Call
from ..passes.exported import is_exported, rebuild
from ..passes.stage import StageModule
from ..values import same_bits
from .floats import own_failure

_PROGRAM = "torch.export.exported_program.ExportedProgram"
_UNFLATTENED = "torch.export.unflatten.UnflattenedModule"
_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"

#: Random state of the two runs that are compared.
_SEED = 20


def take_in(model: object, call: Call | None, inplace: bool) -> object:
    """The model to prepare; the one given, unless it is exported or compiled.

    ``call``: example inputs, on which what is rebuilt must give the bits of the exported module.
    ``inplace``: exported modules inside of a model are replaced in the model itself.
    Raises StageError for what holds no Python modules any more.
    """
    if is_kind(model, _PROGRAM):
        raise StageError(
            "prepare_apot wants an nn.Module, not an ExportedProgram; pass program.module()"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise StageError(
            "prepare_apot wants an nn.Module whose forward is Python, not a "
            f"{type(model).__name__}; pass the model that was scripted or traced"
        )
    if is_kind(model, _UNFLATTENED):
        raise StageError(
            "prepare_apot takes no unflattened export; pass the module() of the ExportedProgram"
        )
    if is_kind(model, _COMPILED):
        assert isinstance(model, nn.Module)
        original = model.get_submodule("_orig_mod")
        warnings.warn(
            f"the {type(original).__name__} inside of torch.compile's module is prepared, "
            "under its own names; compile the prepared or converted model instead",
            stacklevel=4,
        )
        return take_in(original, call, inplace)
    if not isinstance(model, nn.Module):
        return model
    if isinstance(model, fx.GraphModule) and is_exported(model):
        return _rebuilt(model, call)
    if any(map(_needs_other, model.modules())):
        model = model if inplace else copy_of(model)
        substitute([model], {id(m): _other(m) for m in model.modules() if _needs_other(m)})
    return model


def _needs_other(part: nn.Module) -> bool:
    return is_kind(part, _COMPILED) or is_exported(part)


def _other(part: nn.Module) -> nn.Module:
    """What stands for an exported or compiled module inside of a model."""
    if isinstance(part, fx.GraphModule):
        return rebuild(part).eval()
    return Uncompiled(part.get_submodule("_orig_mod"))


class Uncompiled(nn.Module):
    """In place of torch.compile's module, with the same keys: it would go on running the original,
    not the layers that are put in."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self._orig_mod = original
        self.training = original.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._orig_mod(*args, **kwargs)


def _rebuilt(exported: fx.GraphModule, call: Call | None) -> StageModule:
    """An exported module as a stage in eval, checked to compute the same."""
    stage = rebuild(exported)
    if call is not None:
        call.bound(exported)
        expected = _outputs(exported, call, exported)
        same = same_bits(expected, _outputs(stage, call))
        if not same and same_bits(expected, _outputs(exported, call, exported)):
            raise TraceError(
                "the exported module's graph, rebuilt with live layers, gives other bits than the "
                "module itself; please report it with the module"
            )
    return stage.eval()


def _outputs(model: nn.Module, call: Call, exported: nn.Module | None = None) -> Any:
    """What a module gives in the mode that it is in; the buffers it writes into come back."""
    own = call.copied()
    try:
        with _buffers_kept(model), torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(_SEED)
            return model(*own.args, **own.kwargs)
    except Exception as problem:
        if exported is None:
            raise TraceError(
                f"the exported module's graph, rebuilt, fails with {type(problem).__name__}: "
                f"{problem}"
            ) from problem
        raise own_failure(model, problem) from problem


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
