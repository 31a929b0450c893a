"""The placeholders of a traced forward: options are fixed as they are, under a guard."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..nn import Expanded
from .example import Call
from .guards import check_count, check_given, check_keywords, check_option, check_same
from .proxy import UNKNOWN, is_proxy, members
from .refusal import Untraceable

if TYPE_CHECKING:
    from .tracer import ApotTracer


class RootArguments:
    """Makes the placeholders of one trace.

    ``call``: the example's, or None; what it leaves out is left out in the graph too.
    """

    def __init__(self, tracer: ApotTracer, call: Call | None) -> None:
        self.tracer = tracer
        self.example = call is not None
        self.given = {} if call is None else call.bound(tracer.root).arguments
        self.seen: dict[int, fx.Proxy] = {}
        self.attends = any(isinstance(module, Expanded) for module in tracer.root.modules())
        self.by_name = frozenset() if call is None else frozenset(call.kwargs)

    def make(self, signature: inspect.Signature) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments to trace forward with; ``self`` is not among them."""
        positional: list[Any] = []
        keywords: dict[str, Any] = {}
        for parameter in list(signature.parameters.values())[1:]:
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional.extend(self._variable(f"*{parameter.name}"))
            elif parameter.kind is parameter.VAR_KEYWORD:
                keywords.update(self._variable_keywords(parameter.name))
            else:
                self._add_argument(parameter, positional, keywords)
        return positional, keywords

    def _add_argument(
        self,
        parameter: inspect.Parameter,
        positional: list[Any],
        keywords: dict[str, Any],
    ) -> None:
        """Pass an argument as the example does; one that it leaves out is left out here too."""
        argument = self._argument(parameter)
        by_name = parameter.kind is parameter.KEYWORD_ONLY or parameter.name in self.by_name
        if by_name or (parameter.name not in self.given and self.example):
            if parameter.name in self.given or is_proxy(argument):
                keywords[parameter.name] = argument
        else:
            positional.append(argument)

    def _placeholder(self, name: str, default: tuple[Any, ...], value: Any) -> fx.Proxy:
        made = self.tracer.create_proxy("placeholder", name, default, {})
        if self.example:
            self.tracer.values[made.node] = value
        return made

    def _argument(self, parameter: inspect.Parameter) -> Any:
        name, has_default = parameter.name, parameter.default is not parameter.empty
        value = self.given.get(name, parameter.default if has_default else UNKNOWN)
        default = (parameter.default,) if has_default and _is_plain(parameter.default) else ()
        if has_default and not default:
            default = (None,)
        made = self._placeholder(name, default, value)
        is_option = value is None or isinstance(value, (bool, str))
        if value is not UNKNOWN and (
            is_option or (name not in self.given and not _is_number(value))
        ):
            fixed = None if default == (None,) and name not in self.given else value
            self.tracer.guard(check_option, made, fixed, name)
            return value
        if default == (None,) and value is not UNKNOWN:
            self.tracer.guard(check_given, made, name)
        if self.attends and isinstance(value, torch.Tensor):
            return self._shared(made, value, name)
        return made

    def _shared(self, made: fx.Proxy, value: torch.Tensor, name: str) -> fx.Proxy:
        """Self-attention's one tensor for query, key and value: then torch has one product."""
        first = self.seen.setdefault(id(value), made)
        if first is not made:
            self.tracer.guard(check_same, made, first, name)
        return first

    def _variable(self, name: str) -> Iterable[Any]:
        if not self.example:
            raise Untraceable(f"{name} in the signature, without example_inputs")
        value = self.given.get(name[1:], ())
        made = self._placeholder(name, (), value)
        self.tracer.guard(check_count, made, len(value), name)
        return members(made, len(value))

    def _variable_keywords(self, name: str) -> dict[str, Any]:
        value = self.given.get(name, {})
        made: Any = self._placeholder(f"**{name}", (), value)
        self.tracer.guard(check_keywords, made, sorted(value), name)
        return {
            key: made[key] if isinstance(item, (torch.Tensor, tuple, list, dict)) else item
            for key, item in value.items()
        }


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))
