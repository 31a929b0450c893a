"""The bodies of prepare, calibrate and convert.

``stages`` says what a model is and what a verb wants; ``floats`` runs the float model and compares
bits; ``capture`` finds what of it fits into graphs; ``prepare``, ``calibrate`` and ``convert``
import these.
"""

from .calibrate import calibrate
from .convert import BACKENDS, check_convertible, convert
from .floats import in_float
from .merge import merge_observers
from .prepare import prepare
from .stages import require_stage

__all__ = [
    "BACKENDS",
    "calibrate",
    "check_convertible",
    "convert",
    "in_float",
    "merge_observers",
    "prepare",
    "require_stage",
]
