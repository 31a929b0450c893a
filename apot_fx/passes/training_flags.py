"""Stand-ins for ``module.training`` while tracing: a call that is handed one knows whose it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from .opaque_call import OpaqueCall
from .proxy import TrainingFlag

#: ``node.meta`` key: which module's training flag the call follows.
TRAINING_OF = "apot_training_of"


@contextmanager
def training_flags(model: nn.Module, branched: Callable[[str, str], None]) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    try:
        for name, module in model.named_modules():
            module.__dict__["training"] = TrainingFlag(module.training, name, branched)
        yield
    finally:
        for module, training in before:
            module.__dict__["training"] = training


@contextmanager
def plain_flags(module: nn.Module) -> Iterator[None]:
    """While open, a leaf that is run on values has plain training flags: torch's calls want bools.

    So have the modules that an opaque function is given.
    """
    given = module.constants if isinstance(module, OpaqueCall) else ()
    roots = [module, *(m for m in given if isinstance(m, nn.Module))]
    flagged = [m for root in roots for m in root.modules()]
    before = [(m, m.training) for m in flagged if isinstance(m.training, TrainingFlag)]
    try:
        for m, training in before:
            m.__dict__["training"] = int(training) != 0
        yield
    finally:
        for m, training in before:
            m.__dict__["training"] = training


def plain(arguments: Any) -> Any:
    """Arguments with plain bools for training flags."""
    return fx.node.map_aggregate(
        arguments, lambda arg: int(arg) != 0 if isinstance(arg, TrainingFlag) else arg
    )


def settle_training_flags(node: fx.Node) -> None:
    """Replace flags in a call's arguments by plain bools and note whose they were."""
    owners: list[str] = []

    def settle(value: Any) -> Any:
        if isinstance(value, TrainingFlag):
            owners.append(value.owner)
            return int(value) != 0
        return value

    node.args = tuple(settle(arg) for arg in node.args)
    node.kwargs = {key: settle(value) for key, value in node.kwargs.items()}
    if owners:
        node.meta[TRAINING_OF] = owners[0]
