"""Help for quantization-aware training."""

from .accumulating import accumulating

__all__ = ["accumulating"]
