"""``TensorAPoT``: codes, with the quantizer that made them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ._checks import checked

if TYPE_CHECKING:
    from .quantizer import APoTQuantizer


@dataclasses.dataclass(eq=False, repr=False)
class TensorAPoT:
    """A quantized tensor in the original's form. Pickles; copies; moves.

    Args:
        quantizer: what made the codes, and can dequantize them.
        apot_data: the codes, integers, of any shape. Raises TensorError for what is no such tensor.

    :class:`apot_fx.ApotTensor` is the library's own: packed at the stored bits.

    >>> from apot_fx.compat import APoTObserver, quantize_APoT
    >>> observer, x = APoTObserver(b=4, k=2), torch.tensor([0.0, 0.385, 1.0])
    >>> t = quantize_APoT(observer(x), *observer.calculate_qparams(signed=False))
    >>> t
    TensorAPoT(tensor([ 0, 13,  5], dtype=torch.int32), APoTQuantizer(alpha=1, 16 levels))
    >>> again = TensorAPoT.from_state_dict(t.state_dict())
    >>> again.int_repr().tolist()
    [0, 13, 5]
    """

    quantizer: APoTQuantizer
    apot_data: dataclasses.InitVar[Tensor]
    data: Tensor = dataclasses.field(init=False)

    def __post_init__(self, apot_data: Tensor) -> None:
        checked(apot_data, "TensorAPoT: apot_data", "integer")
        self.data = apot_data

    def int_repr(self) -> Tensor:
        """The codes."""
        return self.data

    def to(self, device: torch.device | str | int) -> TensorAPoT:
        """A copy on another device, quantizer and all."""
        return TensorAPoT(self.quantizer.to(device), self.data.to(device))

    def state_dict(self) -> dict[str, Tensor]:
        """``data`` and ``quantizer.alpha``, ``.gamma``, ``.quantization_levels``,
        ``.level_indices``."""
        state = {f"quantizer.{name}": value for name, value in self.quantizer.state_dict().items()}
        return {"data": self.data, **state}

    @staticmethod
    def from_state_dict(state: Mapping[str, Tensor]) -> TensorAPoT:
        """The tensor whose :meth:`state_dict` this is; raises StateError for another one's."""
        from .quantizer import APoTQuantizer, take

        names = [name for name in state if name.startswith("quantizer.")]
        own = {name.removeprefix("quantizer."): state[name] for name in names}
        return TensorAPoT(APoTQuantizer.from_state_dict(own), take(state, "data"))

    def __repr__(self) -> str:
        return f"TensorAPoT({self.data}, {self.quantizer})"
