"""Every exception of apot_fx: one tree, rooted at :class:`ApotError`.

A message says what was wrong, where (the qualified name of a layer, node or key) and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ApotError(Exception):
    """Root of every error that apot_fx raises on purpose."""


class LevelSetError(ApotError, ValueError):
    """Bits, k, scheme or integers that describe no legal level set."""


class ConfigError(ApotError, ValueError):
    """A spec, preset name or layer name that can't be used."""


class TensorError(ApotError, ValueError):
    """A tensor of the wrong shape, dtype or content (NaN weight, alpha out of limits)."""


class TraceError(ApotError, RuntimeError):
    """A model that the tracer can't follow."""


class GuardError(TraceError):
    """A graph is run on inputs for which the model would decide otherwise than while it was traced.

    ``line``: the ``file.py:12`` that decides, or "".
    """

    def __init__(self, message: str, line: str = "") -> None:
        super().__init__(message)
        self.line = line


class ModelError(ApotError, RuntimeError):
    """The user's own model fails, in float, on the inputs that came with it."""


class StageError(ApotError, RuntimeError):
    """A float, prepared or converted model where another stage was wanted."""


class CalibrationError(ApotError, RuntimeError):
    """Calibration without data, with unusable batches, or missing where it is needed."""


class StateError(ApotError, RuntimeError):
    """A state_dict whose content doesn't fit the stage that loads it."""


class GrammarError(ApotError, RuntimeError):
    """A graph that breaks the rules of its stage."""


class ParityError(ApotError, AssertionError):
    """Two stages that do not agree bit for bit."""


class CompatError(ApotError, AssertionError):
    """What PyTorch's experimental APoT refused by an assert: impossible b and k, no qparams."""


class MissingPackageError(ApotError, ImportError):
    """A package that an extra installs is wanted and missing."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or ``""``.

    >>> did_you_mean("w4a5", ["w4a4", "w8a8"])
    " Did you mean 'w4a4'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
