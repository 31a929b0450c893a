"""``APoTQuantizer`` and its functions: values to codes and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import StateError, TensorError
from . import _tables
from ._checks import QPARAMS, checked, qparam
from .APoT_tensor import TensorAPoT


@dataclasses.dataclass(eq=False, repr=False)
class APoTQuantizer:
    """Quantize and dequantize by what ``APoTObserver.calculate_qparams`` gave.

    Other levels serve too, in any order, if 0 is among them: they are taken exactly as they are.

    Args:
        alpha: clip value, one float.
        gamma: kept as the original has it; the levels say all.
        quantization_levels: float, (N,).
        level_indices: the code of each level, integers, (N,).

    Its methods raise CompatError where the levels make no level set, TensorError where one of the
    four is no tensor of a fitting kind.

    >>> from apot_fx.compat import APoTObserver
    >>> observer = APoTObserver(b=4, k=2)
    >>> x = observer(torch.tensor([0, 0.0215, 0.1692, 0.385, 1, 0.0391]))
    >>> quantizer = APoTQuantizer(*observer.calculate_qparams(signed=False))
    >>> quantizer.quantize(x).data.tolist()
    [0, 3, 8, 13, 5, 12]
    >>> [round(y, 4) for y in quantizer.quant_dequant(x).tolist()]
    [0.0, 0.0208, 0.1667, 0.375, 1.0, 0.0417]
    >>> quantizer.q_apot_alpha()
    1.0
    """

    alpha: Tensor
    gamma: Tensor
    quantization_levels: Tensor
    level_indices: Tensor

    @property
    def _table(self) -> tuple[Tensor, Tensor, Tensor]:
        values = self.state_dict()
        return values["alpha"], values["quantization_levels"], values["level_indices"]

    def quantize(self, tensor2quantize: Tensor) -> TensorAPoT:
        """Codes of the nearest levels, int32, ties to the lower level; x itself is left alone.

        ``tensor2quantize``: float, any shape and strides. Beyond the ends it clips; NaN gives
        level 0. Raises TensorError for another dtype.
        """
        codes = _tables.quantize(checked(tensor2quantize, *_FLOAT_X), *self._table)
        return TensorAPoT(self, codes)

    def dequantize(self, apot_tensor: TensorAPoT) -> Tensor:
        """The level of every code, float32 (float64 where the levels are).

        Raises TensorError for a code that ``level_indices`` does not have.
        """
        return _tables.dequantize(_as_apot(apot_tensor).data, *self._table)

    def quant_dequant(self, tensor2quantize: Tensor) -> Tensor:
        """``dequantize(quantize(x))``, of x's dtype, without a gradient
        (:class:`fake_quantize_function` has one)."""
        return _tables.quant_dequant(checked(tensor2quantize, *_FLOAT_X), *self._table)

    def q_apot_alpha(self) -> float:
        """The α in use, within [2^-40, 2^40]: ``alpha``, or, where the levels are not those of
        ``alpha``, the largest of them. Raises as the other methods."""
        return float(_tables.read_table(*self._table, torch.device("cpu")).alpha)

    def to(self, device: torch.device | str | int) -> APoTQuantizer:
        """A copy on another device."""
        return APoTQuantizer(*(value.to(device) for value in self.state_dict().values()))

    def state_dict(self) -> dict[str, Tensor]:
        """The four tensors by name."""
        return {name: qparam(getattr(self, name), f"APoTQuantizer: {name}") for name in QPARAMS}

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> APoTQuantizer:
        """The quantizer whose :meth:`state_dict` this is; raises StateError for another one's."""
        return APoTQuantizer(*(take(state, name) for name in QPARAMS))

    def __repr__(self) -> str:
        try:
            shown = f"{float(self.alpha):g}"
        except Exception:  # a fake tensor, or any under a FakeTensorMode, has no value
            shown = "?"
        return f"APoTQuantizer(alpha={shown}, {len(self.quantization_levels)} levels)"


def take(state: Mapping[str, Tensor], name: str) -> Tensor:
    """``state[name]``; raises StateError."""
    if name not in state:
        raise StateError(f"{name!r} is missing; the state_dict has {', '.join(state) or 'nothing'}")
    return state[name]


_FLOAT_X = ("quantize: x", "floating-point")


def _as_apot(value: Any) -> TensorAPoT:
    if not isinstance(value, TensorAPoT):
        raise TensorError(
            f"dequantize: a TensorAPoT is wanted, not a {type(value).__name__}; "
            "TensorAPoT(quantizer, codes) makes one of codes"
        )
    return value


def quantize_APoT(
    tensor2quantize: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    quantization_levels: Tensor,
    level_indices: Tensor,
) -> TensorAPoT:
    """``APoTQuantizer(alpha, …).quantize(tensor2quantize)``.

    >>> from apot_fx.compat import APoTObserver
    >>> observer, x = APoTObserver(b=8, k=1), torch.tensor([0.0, 51.2, 255.0])
    >>> quantize_APoT(observer(x), *observer.calculate_qparams(signed=False)).data.tolist()
    [0, 51, 255]
    """
    quantizer = APoTQuantizer(alpha, gamma, quantization_levels, level_indices)
    return quantizer.quantize(tensor2quantize)


def dequantize_APoT(apot_tensor: TensorAPoT) -> Tensor:
    """``apot_tensor.quantizer.dequantize(apot_tensor)``.

    >>> from apot_fx.compat import APoTObserver
    >>> observer, x = APoTObserver(b=8, k=1), torch.tensor([0.0, 51.2, 255.0])
    >>> codes = quantize_APoT(observer(x), *observer.calculate_qparams(signed=False))
    >>> dequantize_APoT(codes).tolist()
    [0.0, 51.0, 255.0]
    """
    return _as_apot(apot_tensor).quantizer.dequantize(apot_tensor)


def quant_dequant_APoT(
    tensor2quantize: Tensor,
    alpha: Tensor,
    gamma: Tensor,
    quantization_levels: Tensor,
    level_indices: Tensor,
) -> Tensor:
    """``APoTQuantizer(alpha, …).quant_dequant(tensor2quantize)``.

    >>> from apot_fx.compat import APoTObserver
    >>> observer, x = APoTObserver(b=8, k=1), torch.tensor([0.0, 51.2, 255.0])
    >>> quant_dequant_APoT(observer(x), *observer.calculate_qparams(signed=False)).tolist()
    [0.0, 51.0, 255.0]
    """
    quantizer = APoTQuantizer(alpha, gamma, quantization_levels, level_indices)
    return quantizer.quant_dequant(tensor2quantize)
