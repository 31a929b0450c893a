"""What a failed trace teaches: which function, or else which module, has to stay in one piece."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import TraceError
from .opaque_call import Place, places_of
from .proxy import holds_proxy
from .tracer import ApotTracer

#: So many modules of one class failing means that all of its modules would.
_SAME_CLASS = 3


@dataclasses.dataclass
class Attempts:
    """What has to stay in one piece, learned from failed traces."""

    modules: dict[str, str] = dataclasses.field(default_factory=dict)  # path → reason
    functions: dict[types.CodeType, list[Place]] = dataclasses.field(default_factory=dict)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)  # function's name → reason
    banned: set[types.CodeType] = dataclasses.field(default_factory=set)

    def learn(self, model: nn.Module, tracer: ApotTracer, problem: Exception) -> None:
        """Name what failed, function before module; raises TraceError where it is the root."""
        remedy = (
            "rewrite that line" if tracer.example else "pass example_inputs, or rewrite that line"
        )
        why = f"untraceable at {_where(problem)}: {_first_line(problem)}; {remedy}"
        if self._ban(tracer) or (tracer.example and self._learn_function(problem, why)):
            return
        name = tracer.failed_in
        if not name or name in self.modules:
            raise TraceError(why) from problem
        self.modules[name] = why
        kind = type(model.get_submodule(name))
        alike = [path for path, module in model.named_modules() if type(module) is kind]
        if sum(path in self.modules for path in alike) >= _SAME_CLASS:
            for path in alike:
                self.modules.setdefault(path, why)

    def _ban(self, tracer: ApotTracer) -> bool:
        """Forget functions that turned out not to be callable as a whole."""
        codes = {inspect.unwrap(function).__code__ for function in tracer.refused}
        self.banned |= codes
        for code in codes:
            self.reasons.pop(f"{code.co_name}()", None)
        return bool([code for code in codes if self.functions.pop(code, None)])

    def _learn_function(self, problem: Exception, why: str) -> bool:
        """Whether some function below the innermost module can be called as a whole."""
        frames = [frame for frame, _ in traceback.walk_tb(problem.__traceback__)]
        inner = 1 + max(
            (n for n, f in enumerate(frames) if f.f_code is ApotTracer.call_module.__code__),
            default=-1,
        )
        for place in range(len(frames) - 1, inner, -1):
            code = frames[place].f_code
            if _is_ours(frames[place]) or code in self.banned or code in self.functions:
                continue
            found = places_of(frames[place], frames[inner:place][::-1])
            if found:
                self.functions[code] = found
                self.reasons[f"{code.co_name}()"] = why
                return True
        return False


def _is_ours(frame: types.FrameType) -> bool:
    return any(part in frame.f_code.co_filename for part in ("/torch/", "/apot_fx/", "<"))


@contextmanager
def opaque_functions(tracer: ApotTracer, attempts: Attempts) -> Iterator[None]:
    """While open, the functions named in ``attempts`` are recorded as one call each."""
    before: list[tuple[dict[str, Any] | type, str, Any]] = []
    try:
        for owner, name in [place for found in attempts.functions.values() for place in found]:
            function = vars(owner)[name] if isinstance(owner, type) else owner[name]
            before.append((owner, name, function))
            _set(owner, name, _recorded(tracer, function))
        yield
    finally:
        for owner, name, function in before:
            _set(owner, name, function)


def _set(owner: dict[str, Any] | type, name: str, function: Callable[..., Any]) -> None:
    if isinstance(owner, type):
        setattr(owner, name, function)
    else:
        owner[name] = function


def _recorded(tracer: ApotTracer, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def record(*args: Any, **kwargs: Any) -> Any:
        if tracer.concrete or not _any_proxy(args, kwargs):
            return function(*args, **kwargs)
        return tracer.call_opaquely(function, args, kwargs)

    return record


def _any_proxy(args: Any, kwargs: Any) -> bool:
    return holds_proxy(args) or holds_proxy(kwargs.values())


def _where(problem: BaseException) -> str:
    """``file.py:12`` of the last frame outside torch."""
    frames = traceback.extract_tb(problem.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename and "/apot_fx/" not in f.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"


def _first_line(problem: BaseException) -> str:
    return (str(problem).strip().splitlines() or [type(problem).__name__])[0]
