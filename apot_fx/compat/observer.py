"""``APoTObserver``: sees tensors, gives α, γ, levels and their codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import kernels
from ..errors import CompatError, MissingPackageError
from ..kernels import readable
from . import _tables
from ._checks import one_value
from ._module import SpanObserver

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class APoTObserver(SpanObserver):
    """The largest magnitude seen, and the APoT levels up to it.

    Args:
        b: bits of a code.
        k: bits of a term; it divides b.
        dtype: kept as an attribute, for code that reads it.

    Attributes:
        min_val, max_val: ends of what was seen, float32; settable. ±inf before anything is seen.
        n: terms, b / k, once qparams were calculated.

    >>> observer = APoTObserver(b=4, k=2)
    >>> observer(torch.tensor([0.0, 0.3, 1.0])).tolist() == torch.tensor([0.0, 0.3, 1.0]).tolist()
    True
    >>> alpha, gamma, levels, codes = observer.calculate_qparams(signed=False)
    >>> alpha.item(), round(gamma.item(), 4), (levels * 48).round().int().tolist()
    (1.0, 0.6667, [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48])
    >>> codes.tolist()
    [0, 3, 12, 15, 2, 14, 8, 11, 10, 1, 13, 9, 4, 7, 6, 5]
    """

    def __init__(self, b: int, k: int, dtype: torch.dtype = torch.quint8) -> None:
        super().__init__()
        self.b, self.k, self.dtype = b, k, dtype

    @property
    def min_val(self) -> Tensor:
        return self.low

    @min_val.setter
    def min_val(self, value: float | Tensor) -> None:
        self.low = self._end(value, "min_val")

    @property
    def max_val(self) -> Tensor:
        return self.high

    @max_val.setter
    def max_val(self, value: float | Tensor) -> None:
        self.high = self._end(value, "max_val")

    def _end(self, value: float | Tensor, name: str) -> Tensor:
        end = torch.as_tensor(value, dtype=torch.float32).to(self.low.device).detach().clone()
        return one_value(end, f"APoTObserver: {name}")

    @torch.compiler.disable  # level sets are looked up in Python, not in a graph
    def calculate_qparams(
        self,
        signed: bool,
        min_val: float | Tensor | None = None,
        max_val: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """α, γ = α / (2 − 2^(1−n)), the levels ascending, and the code of each.

        Args:
            signed: whether every term also takes negative values. Codes can share a level then:
                49 codes and 39 levels with b = 4, k = 2.
            min_val, max_val: ends to use from now on instead of those seen.

        Returns:
            alpha, gamma: float32, of min_val's shape; α is clamped to [2^-40, 2^40].
            quantization_levels: float32, a level for each of 2^b (unsigned) codes.
            level_indices: int64, these codes.

        Raises CompatError (an AssertionError) for impossible b and k, or where nothing finite was
        seen; TensorError for an end of more than one value.

        >>> observer = APoTObserver(b=6, k=1)
        >>> _, gamma, levels, _ = observer.calculate_qparams(signed=False, min_val=0.0, max_val=1.0)
        >>> bool(gamma == 32 / 63), len(levels)
        (True, 64)
        """
        level_set = _tables.torch_set(self.b, self.k, signed)
        self.n = self.b // self.k
        if min_val is not None:
            self.min_val = min_val
        if max_val is not None:
            self.max_val = max_val
        if readable(self.low) and not self.seen:
            raise CompatError(
                f"APoTObserver(b={self.b}, k={self.k}) saw no finite value; run it on data, or set "
                "min_val and max_val"
            )
        return _tables.make_qparams(self.span(), level_set)

    def quant_levels_visualization(self, signed: bool = False) -> Figure:
        """Draw what quantization makes of 1,000 values up to α; needs no display.

        Returns a matplotlib Figure (``.savefig("levels.png")``). Raises MissingPackageError without
        matplotlib, and as :meth:`calculate_qparams`.

        >>> import pytest
        >>> _ = pytest.importorskip("matplotlib")
        >>> observer = APoTObserver(b=4, k=2)
        >>> observer.min_val, observer.max_val = torch.tensor(0.0), torch.tensor(1.0)
        >>> len(observer.quant_levels_visualization().axes[0].lines[0].get_xdata())
        1000
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingPackageError(
                "quant_levels_visualization draws with matplotlib; pip install 'apot_fx[plot]'"
            ) from None
        qparams = self.calculate_qparams(signed)
        alpha = qparams[0].item()
        values = torch.linspace(-alpha if signed else 0.0, alpha, 1000)
        level_set = _tables.torch_set(self.b, self.k, signed)
        index = kernels.quantize(values, alpha, level_set)
        figure = Figure(figsize=(15, 10))
        axes = figure.subplots()
        axes.plot(values.tolist(), kernels.dequantize(index, alpha, level_set).tolist())
        axes.set_title(f"APoT levels, b={self.b}, k={self.k}")
        axes.set_xlabel("full precision")
        axes.set_ylabel("quantized")
        return figure

    def extra_repr(self) -> str:
        return f"b={self.b}, k={self.k}, dtype={self.dtype}"
