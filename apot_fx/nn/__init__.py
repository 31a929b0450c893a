"""Prepared and converted operators.

``op`` says what all have in common, ``quantize`` how results leave a converted operator,
``weighted`` what layers with one weight share. ``products`` and ``convolution`` (what multiplies
and adds) and ``fold`` (scale, bias, batch norm) are the arithmetic that both stages of a layer
share; ``prepared``, ``layers`` (which stands for which float layer) and ``converted`` hold the
layers, ``embedding``, ``add``, ``pool``, ``contraction`` (products of two activations) and
``dot_attention`` a pair each; ``recurrence`` and ``recurrent`` the recurrent layers, and
``standalone`` those that Python code calls rather than a graph. ``attention`` and ``transformer``
are torch's float modules, written out for tracing. Files import only those named before them here.
"""

from .add import ConvertedAdd, PreparedAdd
from .attention import Expanded, attend
from .contraction import (
    Contraction,
    ConvertedPairOp,
    ConvertedProduct,
    PreparedPairOp,
    PreparedProduct,
)
from .converted import ConvertedLayer
from .convolution import ConvProduct, TransposedProduct
from .dot_attention import Attention, ConvertedAttention, PreparedAttention
from .embedding import EMBEDDINGS, ConvertedEmbedding, PreparedEmbedding, PreparedEmbeddingBag
from .layers import CONV1D, PREPARED, TRANSPOSED, can_fold, is_conv1d, prepared_type
from .norm import ConvertedNorm, PreparedNorm
from .op import ConvertedOp, PreparedOp
from .pool import ConvertedPool, Pool, PreparedPool
from .prepared import FunctionalLayer, PreparedFunctional, PreparedLayer
from .products import LeftProduct, LinearProduct, Product
from .quantize import Quantize, Reader
from .recurrent import RECURRENT, ConvertedRecurrent, PreparedRecurrent
from .standalone import (
    STANDALONE,
    convert_standalone,
    has_hooks,
    input_fake_quants,
    is_standalone_type,
    keep_children,
    prepare_standalone,
)
from .through_float import ThroughFloat
from .transformer import EXPANDED, expand_attention, restore_attention
from .weighted import ConvertedWeighted, PreparedWeighted

#: Which converted operator takes a prepared one's place in a graph.
CONVERTED: tuple[tuple[type[PreparedOp], type[ConvertedOp]], ...] = (
    (PreparedLayer, ConvertedLayer),
    (PreparedAdd, ConvertedAdd),
    (PreparedPool, ConvertedPool),
    (PreparedNorm, ConvertedNorm),
    (PreparedProduct, ConvertedProduct),
    (PreparedAttention, ConvertedAttention),
)

__all__ = [
    "CONV1D",
    "CONVERTED",
    "EMBEDDINGS",
    "EXPANDED",
    "PREPARED",
    "RECURRENT",
    "STANDALONE",
    "TRANSPOSED",
    "Attention",
    "Contraction",
    "ConvProduct",
    "ConvertedAdd",
    "ConvertedAttention",
    "ConvertedEmbedding",
    "ConvertedLayer",
    "ConvertedNorm",
    "ConvertedOp",
    "ConvertedPairOp",
    "ConvertedPool",
    "ConvertedProduct",
    "ConvertedRecurrent",
    "ConvertedWeighted",
    "Expanded",
    "FunctionalLayer",
    "LeftProduct",
    "LinearProduct",
    "Pool",
    "PreparedAdd",
    "PreparedAttention",
    "PreparedEmbedding",
    "PreparedEmbeddingBag",
    "PreparedFunctional",
    "PreparedLayer",
    "PreparedNorm",
    "PreparedOp",
    "PreparedPairOp",
    "PreparedPool",
    "PreparedProduct",
    "PreparedRecurrent",
    "PreparedWeighted",
    "Product",
    "Quantize",
    "Reader",
    "ThroughFloat",
    "TransposedProduct",
    "attend",
    "can_fold",
    "convert_standalone",
    "expand_attention",
    "has_hooks",
    "input_fake_quants",
    "is_conv1d",
    "is_standalone_type",
    "keep_children",
    "prepare_standalone",
    "prepared_type",
    "restore_attention",
]
