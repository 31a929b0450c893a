"""Prepared and converted operators.

``op`` says what all have in common, ``quantize`` how results leave a converted operator.
``products`` (multiply-accumulate kinds) and ``fold`` (scale, bias, batch norm) are the arithmetic
that both stages of a layer share; ``prepared`` and ``converted`` hold the layers, ``add`` and
``pool`` a pair each; ``recurrence`` and ``recurrent`` the recurrent layers, and ``standalone`` the
layers that Python code calls rather than a graph. ``attention`` and ``transformer`` are torch's
float modules, written out for tracing. Files import only those named before them here.
"""

from .add import ConvertedAdd, PreparedAdd
from .attention import Expanded, attend
from .converted import ConvertedLayer
from .op import ConvertedOp, PreparedOp
from .pool import ConvertedPool, Pool, PreparedPool
from .prepared import PREPARED, FunctionalLayer, PreparedFunctional, PreparedLayer, can_fold
from .products import ConvProduct, LinearProduct
from .quantize import Quantize, Reader
from .recurrent import RECURRENT, ConvertedRecurrent, PreparedRecurrent
from .standalone import (
    STANDALONE,
    convert_standalone,
    has_hooks,
    input_fake_quants,
    prepare_standalone,
)
from .through_float import ThroughFloat
from .transformer import EXPANDED, expand_attention, restore_attention

#: Which converted operator takes a prepared one's place.
CONVERTED: tuple[tuple[type[PreparedOp], type[ConvertedOp]], ...] = (
    (PreparedLayer, ConvertedLayer),
    (PreparedAdd, ConvertedAdd),
    (PreparedPool, ConvertedPool),
)

__all__ = [
    "CONVERTED",
    "EXPANDED",
    "PREPARED",
    "RECURRENT",
    "STANDALONE",
    "ConvProduct",
    "ConvertedAdd",
    "ConvertedLayer",
    "ConvertedOp",
    "ConvertedPool",
    "ConvertedRecurrent",
    "Expanded",
    "FunctionalLayer",
    "LinearProduct",
    "Pool",
    "PreparedAdd",
    "PreparedFunctional",
    "PreparedLayer",
    "PreparedOp",
    "PreparedPool",
    "PreparedRecurrent",
    "Quantize",
    "Reader",
    "ThroughFloat",
    "attend",
    "can_fold",
    "convert_standalone",
    "expand_attention",
    "has_hooks",
    "input_fake_quants",
    "prepare_standalone",
    "restore_attention",
]
