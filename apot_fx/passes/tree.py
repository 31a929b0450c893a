"""What a prepared or converted model is made of: stages, and standalone layers beside them.

The root is a stage, or, where its forward can't be traced, a module of the user's own class that
carries a :class:`StageInfo`; stages and layers then lie inside, as they do inside of leaves.
"""

from __future__ import annotations

from torch import nn

from ..nn import ConvertedOp, PreparedOp
from .report import PassReport
from .stage import StageInfo, StageModule


def stage_info(model: nn.Module) -> StageInfo | None:
    """What a model knows of its stage; None for a float model."""
    found = model.__dict__.get("apot")
    return found if isinstance(found, StageInfo) else None


def stages(model: nn.Module) -> dict[str, StageModule]:
    """Every prepared or converted stage by its path, outer ones first.

    A traced one among the modules of a stage was traced through, and is not called.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, StageModule) and module.apot.kind != "traced"
    }


def standalone(model: nn.Module) -> dict[str, PreparedOp | ConvertedOp]:
    """Every layer that is called as a float layer is, by its path."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (PreparedOp, ConvertedOp)) and module.standalone
    }


def reports(model: nn.Module) -> list[tuple[str, PassReport]]:
    """What every pass told, with the path of its stage ("" where it names whole paths)."""
    known = stage_info(model)
    own = (
        [] if known is None or isinstance(model, StageModule) else [("", r) for r in known.reports]
    )
    return own + [
        (p, report) for p, stage in stages(model).items() for report in stage.apot.reports
    ]


def joined(path: str, name: str) -> str:
    """``path.name``, either of which may be empty."""
    return f"{path}.{name}" if path and name else path or name
