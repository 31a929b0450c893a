"""Reads: which layers' weights are used by other code than their own forward.

Such a layer can't be packed: the code would find no weight. Attributes such as ``weight.dtype`` may
be asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..passes.annotate import has_weights

_VALUES = frozenset({"data", "T", "mT", "H", "mH", "real", "imag"})
_METADATA = frozenset("size dim numel stride is_floating_point is_complex element_size".split())


@contextmanager
def parameter_reads(model: nn.Module) -> Iterator[dict[str, str]]:
    """While open, note the paths of layers whose parameters other code uses → ``file.py:12``."""
    watch = _Watch(model)
    handles = []
    for module in watch.layers:
        handles.append(module.register_forward_pre_hook(watch.enter))
        handles.append(module.register_forward_hook(watch.leave, always_call=True))
    try:
        with watch:
            yield watch.reads
    finally:
        for handle in handles:
            handle.remove()


class _Watch(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers: dict[nn.Module, str] = {
            module: path for path, module in model.named_modules() if has_weights(module)
        }
        self.owners: dict[int, list[nn.Module]] = {}
        for module in self.layers:
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(id(parameter), []).append(module)
        self.running: list[nn.Module] = []
        self.reads: dict[str, str] = {}

    def enter(self, module: nn.Module, args: Any) -> None:
        self.running.append(module)

    def leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self.running.remove(module)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.running and not _is_metadata(func):
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and id(leaf) in self.owners:
                    self._note(self.owners[id(leaf)])
        return func(*args, **(kwargs or {}))

    def _note(self, owners: list[nn.Module]) -> None:
        frame: Any = sys._getframe(2)
        while frame and ("/torch/nn/functional" in frame.f_code.co_filename):
            frame = frame.f_back
        name = frame.f_code.co_filename
        # Torch's hooks compute the layer's own weight; a graph's reads outlive packing.
        if name.startswith("<eval_with_key>") or "/torch/" in name or "/apot_fx/" in name:
            return
        for owner in owners:
            line = f"{name.rsplit('/', 1)[-1]}:{frame.f_lineno}"
            self.reads.setdefault(self.layers[owner], line)


def _is_metadata(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in _VALUES
    return name in _METADATA
