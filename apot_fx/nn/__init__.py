"""Prepared and converted operators.

``op`` says what all have in common, ``quantize`` how results leave a converted operator.
``products`` (multiply-accumulate kinds) and ``fold`` (scale, bias, batch norm) are the arithmetic
that both stages of a layer share; ``prepared`` and ``converted`` hold the layers, ``add``,
``pool``, ``contraction`` (products of two activations) and ``dot_attention`` a pair each;
``recurrence`` and ``recurrent`` the recurrent layers, and ``standalone`` the layers that Python
code calls rather than a graph. Files import only those named before them here.
"""

from .add import ConvertedAdd, PreparedAdd
from .contraction import (
    Contraction,
    ConvertedPairOp,
    ConvertedProduct,
    PreparedPairOp,
    PreparedProduct,
)
from .converted import ConvertedLayer
from .dot_attention import Attention, ConvertedAttention, PreparedAttention
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

#: Which converted operator takes a prepared one's place.
CONVERTED: tuple[tuple[type[PreparedOp], type[ConvertedOp]], ...] = (
    (PreparedLayer, ConvertedLayer),
    (PreparedAdd, ConvertedAdd),
    (PreparedPool, ConvertedPool),
    (PreparedProduct, ConvertedProduct),
    (PreparedAttention, ConvertedAttention),
)

__all__ = [
    "CONVERTED",
    "PREPARED",
    "RECURRENT",
    "STANDALONE",
    "Attention",
    "Contraction",
    "ConvProduct",
    "ConvertedAdd",
    "ConvertedAttention",
    "ConvertedLayer",
    "ConvertedOp",
    "ConvertedPairOp",
    "ConvertedPool",
    "ConvertedProduct",
    "ConvertedRecurrent",
    "FunctionalLayer",
    "LinearProduct",
    "Pool",
    "PreparedAdd",
    "PreparedAttention",
    "PreparedFunctional",
    "PreparedLayer",
    "PreparedOp",
    "PreparedPairOp",
    "PreparedPool",
    "PreparedProduct",
    "PreparedRecurrent",
    "Quantize",
    "Reader",
    "ThroughFloat",
    "can_fold",
    "convert_standalone",
    "has_hooks",
    "input_fake_quants",
    "prepare_standalone",
]
