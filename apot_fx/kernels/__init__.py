"""The operators ``torch.ops.apot_fx.*`` and the public functions before them.

``reference`` is the quantizer's arithmetic in torch's operators, ``native`` the same in compiled C,
``tables`` what that reads of a level set, ``dispatch`` who computes; ``products`` is linear and
convolution on levels, ``packing`` the bit stream. ``ops`` registers them, ``eager`` is the way
around the dispatcher, ``functional`` checks what users pass.
"""

from . import eager
from . import ops as ops
from .functional import dequantize, fake_quantize, pack, quantize, readable, unpack
from .native import Status, status
from .reference import ALPHA_MAX, ALPHA_MIN, step_of

__all__ = [
    "ALPHA_MAX",
    "ALPHA_MIN",
    "Status",
    "dequantize",
    "eager",
    "fake_quantize",
    "pack",
    "quantize",
    "readable",
    "status",
    "step_of",
    "unpack",
]
