"""What an operator's schema says of a call: what it writes into, what it may share memory with.

Exported graphs call operators (``torch.ops.aten.relu_.default``) rather than torch's functions;
those without a torch function of the same meaning stay, and users' own operators always do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_COMPOSITE = "CompositeImplicitAutograd"


def operator_of(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that a node calls; None for functions, methods and modules."""
    found = node.target if node.op == "call_function" else None
    return found if isinstance(found, torch._ops.OpOverload) else None


def base_name(operator: torch._ops.OpOverload) -> str:
    """``"add_"`` of ``aten.add_.Tensor``; another namespace stands before it."""
    name = operator._schema.name
    return name.removeprefix("aten::")


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """An operator call's arguments by the names of its schema, defaults filled in."""
    operator = operator_of(node)
    assert operator is not None
    bound: dict[str, Any] = {}
    for place, argument in enumerate(operator._schema.arguments):
        given = place < len(node.args)
        default = argument.default_value if argument.has_default_value() else None
        bound[argument.name] = (
            node.args[place] if given else node.kwargs.get(argument.name, default)
        )
    return bound


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes whose tensors an operator call writes into."""
    operator = operator_of(node)
    if operator is None or not operator._schema.is_mutable:
        return []
    bound, found = bound_arguments(node), list[fx.Node]()
    for argument in operator._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            fx.map_arg(bound[argument.name], found.append)
    return found


def operator_alias_kind(operator: torch._ops.OpOverload) -> str:
    """How an operator's result shares memory: ``"perhaps"``, ``"fresh"`` or ``"unknown"``.

    A composite operator may return what it was given though its schema does not say so.
    """
    if any(result.alias_info is not None for result in operator._schema.returns):
        return "perhaps"
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), _COMPOSITE)
    return "unknown" if composite else "fresh"


def without_writing(node: fx.Node) -> torch._ops.OpOverload | None:
    """The operator that gives as a new value what a call writes: ``aten.add`` for ``aten.add_``."""
    operator = operator_of(node)
    assert operator is not None
    namespace, _, name = operator._schema.name.partition("::")
    if len(written_arguments(node)) != 1 or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name[:-1], None)
    twin = getattr(packet, operator._overloadname, None)
    if twin is None or twin._schema.is_mutable:
        return None
    same = [a.name for a in twin._schema.arguments] == [a.name for a in operator._schema.arguments]
    return twin if same else None
