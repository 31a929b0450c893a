"""The operators ``torch.ops.apot_fx.*`` and the public functions before them.

``reference`` is the quantizer's arithmetic, ``products`` linear and convolution on levels,
``packing`` the bit stream; ``ops`` registers them, ``functional`` checks what users pass.
"""

from . import ops as ops
from .functional import dequantize, fake_quantize, pack, quantize, readable, unpack
from .reference import ALPHA_MAX, ALPHA_MIN, step_of

__all__ = [
    "ALPHA_MAX",
    "ALPHA_MIN",
    "dequantize",
    "fake_quantize",
    "pack",
    "quantize",
    "readable",
    "step_of",
    "unpack",
]
