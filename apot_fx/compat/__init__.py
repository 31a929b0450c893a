"""PyTorch's experimental APoT and AdaRound, under its names: thin layers over this library.

One module per file of ``torch.ao.quantization.experimental``, and all its names here. What became
of each, and why, is in docs/migration.md. Levels, quantization and its inverse are
:class:`apot_fx.LevelSet` (scheme "torch") and :mod:`apot_fx.kernels`.

>>> import torch
>>> from apot_fx.compat import APoTObserver, dequantize_APoT, quantize_APoT
>>> observer = APoTObserver(b=4, k=2)
>>> x = observer(torch.tensor([0, 0.0215, 0.1692, 0.385, 1, 0.0391]))
>>> codes = quantize_APoT(x, *observer.calculate_qparams(signed=False))
>>> codes.int_repr().tolist()
[0, 3, 8, 13, 5, 12]
>>> [round(y, 4) for y in dequantize_APoT(codes).tolist()]
[0.0, 0.0208, 0.1667, 0.375, 1.0, 0.0417]
"""

from .adaround_fake_quantize import AdaroundFakeQuantizer
from .adaround_loss import AdaptiveRoundingLoss
from .adaround_optimization import AdaptiveRoundingOptimizer
from .APoT_tensor import TensorAPoT
from .apot_utils import apot_to_float, float_to_apot, quant_dequant_util
from .fake_quantize import APoTFakeQuantize
from .fake_quantize_function import fake_quantize_function
from .linear import LinearAPoT
from .observer import APoTObserver
from .qconfig import (
    apot_qconfig_4bit,
    apot_qconfig_8bit,
    apot_weight_qconfig_4bit,
    apot_weight_qconfig_8bit,
    uniform_qconfig_4bit,
    uniform_qconfig_8bit,
)
from .quantizer import APoTQuantizer, dequantize_APoT, quant_dequant_APoT, quantize_APoT

__all__ = [
    "APoTFakeQuantize",
    "APoTObserver",
    "APoTQuantizer",
    "AdaptiveRoundingLoss",
    "AdaptiveRoundingOptimizer",
    "AdaroundFakeQuantizer",
    "LinearAPoT",
    "TensorAPoT",
    "apot_qconfig_4bit",
    "apot_qconfig_8bit",
    "apot_to_float",
    "apot_weight_qconfig_4bit",
    "apot_weight_qconfig_8bit",
    "dequantize_APoT",
    "fake_quantize_function",
    "float_to_apot",
    "quant_dequant_APoT",
    "quant_dequant_util",
    "quantize_APoT",
    "uniform_qconfig_4bit",
    "uniform_qconfig_8bit",
]
