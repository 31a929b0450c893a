"""What a traced value hangs on: options alone, sizes, or the values of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ..graph import METADATA_METHODS

#: What a Python decision hangs on, from harmless to hopeless.
FIXED, SIZE, DATA = "fixed", "size", "data"
_ORDER = (FIXED, SIZE, DATA)

_RANK_METHODS = frozenset(
    "dim ndimension is_floating_point is_complex element_size get_device is_contiguous".split()
)
_SIZE_ATTRIBUTES = frozenset({"shape", "size", "numel", "nelement", "stride"})


def hangs_on(node: fx.Node, values: Mapping[fx.Node, Any]) -> str:
    """What a value hangs on beside the options: a size (SIZE), tensor values (DATA), or nothing."""
    pending, worst, seen = [node], 0, set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        own = _own_kind(current, values)
        if own is None:
            pending.extend(current.all_input_nodes)
        else:
            worst = max(worst, _ORDER.index(own))
    return _ORDER[worst]


def _own_kind(node: fx.Node, values: Mapping[fx.Node, Any]) -> str | None:
    """What a node brings in by itself; None where its inputs say it."""
    source = node.args[0] if node.args else None
    if node.target is len:
        return SIZE
    of_tensor = isinstance(source, fx.Node) and isinstance(values.get(source), torch.Tensor)
    if node.op == "call_function" and node.target is getattr and of_tensor:
        of_parameter = isinstance(source, fx.Node) and source.op == "get_attr"
        return SIZE if not of_parameter and node.args[1] in _SIZE_ATTRIBUTES else FIXED
    if node.op == "call_method" and of_tensor:
        if node.target in _RANK_METHODS:
            return FIXED
        return SIZE if node.target in METADATA_METHODS else DATA
    if node.op == "placeholder":
        return DATA if isinstance(values.get(node), torch.Tensor) else FIXED
    if node.op in ("call_module", "get_attr") or isinstance(values.get(node), torch.Tensor):
        return DATA
    return None
