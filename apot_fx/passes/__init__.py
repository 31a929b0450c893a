"""The passes, in execution order.

``trace`` makes a stage of a model; then each pass rewrites it:

=====================  ==========================================================================
exported               (in place of tracing) exported graphs get live layers and torch's functions
functionalize          in-place ops become out-of-place, readers are re-pointed
normalize              functional dropout and batch norm become modules
functional_layers      F.linear and F.conv… on parameters become layers
annotate               every layer gets a plan or a reason (the only place of policy)
residual               adds and average pools become operators, where the config says so
products               products of two activations become operators, where the config says so
fold                   a layer and the batch norm that alone reads it become one call
norms                  batch norms that stayed apart become operators, where the config says so
share                  which quantized edges use one fake-quant
insert                 fake-quants on the edges, layers in their prepared form
hoist                  fake-quants move up over index ops
keep_weights           (convert from here) what is read beside its layer outlives packing
split                  folds that the inputs' rank turned out to forbid
drop_dropout           dropout is an identity in eval
hoist                  once more: dropout may have stood in the way
convert_activations    fake-quants become quantizers, index ops take their index form
convert_layers         layers run on packed weights and re-quantize for their readers
=====================  ==========================================================================

``base`` holds the contract of a pass, ``report`` what it tells, ``stage`` the GraphModule it works
on, ``index_ops`` what may be moved over what, ``tied`` what layers with one weight agree on,
``grammar`` the invariants. A pass imports these and, where it reads what an earlier pass wrote,
that pass's keys.
"""

from __future__ import annotations

from ..config import QConfigMapping
from .annotate import Annotate
from .base import Pass, run_passes
from .convert import ConvertActivations, ConvertLayers, DropDropout
from .fold import FoldBatchNorm, SplitBatchNorm
from .functional_layers import FunctionalLayers
from .functionalize import Functionalize
from .hoist import Hoist
from .insert import Insert
from .keep_weights import KeepWeights
from .normalize import Normalize
from .norms import QuantizeNorms
from .products import QuantizeProducts
from .residual import QuantizeResiduals
from .share import Share
from .tied import Groups
from .trace import trace
from .tracer import ApotTracer

__all__ = [
    "ApotTracer",
    "capture_passes",
    "convert_passes",
    "keep_passes",
    "prepare_passes",
    "run_passes",
    "trace",
]


def capture_passes() -> tuple[Pass, ...]:
    """From a traced stage to one that follows the mode, whose bits are those of the model."""
    return (Functionalize(), Normalize())


def prepare_passes(
    mapping: QConfigMapping,
    path: str = "",
    ends: tuple[bool, bool] = (True, True),
    tied: Groups | None = None,
) -> tuple[Pass, ...]:
    """From a captured stage to a prepared one.

    ``path``: where the stage lies in the model; ``ends``: whether its inputs and outputs are the
    model's; ``tied``: the model's layers that share a weight.
    """
    return (
        FunctionalLayers(),
        Annotate(mapping, path, ends, tied or {}),
        QuantizeResiduals(mapping),
        QuantizeProducts(mapping),
        FoldBatchNorm(),
        QuantizeNorms(mapping),
        Share(),
        Insert(path),
        Hoist(),
    )


def keep_passes() -> tuple[Pass, ...]:
    """What every stage goes through before any layer of the model is converted."""
    return (KeepWeights(),)


def convert_passes(
    low_memory: bool = False, shared: frozenset[int] = frozenset()
) -> tuple[Pass, ...]:
    """From a prepared stage in eval mode to a converted one; ``shared``: as of ConvertLayers."""
    return (
        SplitBatchNorm(),
        DropDropout(),
        Hoist(),
        ConvertActivations(),
        ConvertLayers(low_memory, shared),
    )
