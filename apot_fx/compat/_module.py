"""What compat's modules share: ranges, switches, and buffers whose shape data decides."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..levels import LevelSet
from ..observer import MinMaxObserver
from ..tensor import keep_float32
from ._checks import checked

_BOTH_ENDS = LevelSet([-1, 0, 1])


class WithArgs:
    """``with_args``: the class with some of its arguments given, as configs take it."""

    @classmethod
    def with_args(cls, **arguments: Any) -> functools.partial[Any]:
        """A factory: ``APoTObserver.with_args(b=4, k=2)()`` is ``APoTObserver(b=4, k=2)``."""
        return functools.partial(cls, **arguments)


class Growing(nn.Module):
    """A state_dict brings the shapes of tensors in ``grows`` along: data decides them."""

    grows: tuple[str, ...] = ()

    def _load_from_state_dict(  # type: ignore[override]
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any
    ) -> None:
        for name in self.grows:
            loaded = state_dict.get(prefix + name)
            if name in self._parameters and loaded is not None:
                self._parameters[name] = nn.Parameter(torch.empty_like(loaded))
            elif loaded is not None:
                self._buffers[name] = torch.empty_like(loaded)
            elif prefix + "_extra_state" in state_dict:  # saved before anything was observed
                self._buffers[name] = None
        super()._load_from_state_dict(state_dict, prefix, *args)


class CompatModule(WithArgs, Growing):
    """A module whose scales and ranges stay float32."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_float32(fn), recurse)


class SpanObserver(CompatModule, MinMaxObserver):
    """The range of all that was seen; follows its input from device to device."""

    grows = ("low", "high")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Observe ``x`` (real, of any shape) and return it; inf and NaN are ignored.

        Raises TensorError for what is no such tensor.
        """
        checked(x, f"{type(self).__name__}: x")
        if self.low.device != x.device:
            self.to(x.device)
        return super().forward(x)

    def span(self) -> torch.Tensor:
        """The larger of −min and max, within α's limits."""
        return self.propose(_BOTH_ENDS)


class Switched(CompatModule):
    """The switches of a fake-quant: one-element lists, read and written as the original's tensors.

    ``fake.observer_enabled[0] = 0`` is ``fake.disable_observer()``. No tensors, so that forward
    decides without reading data.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observer_enabled = [1]
        self.fake_quant_enabled = [1]

    def enable_observer(self, enabled: bool = True) -> None:
        """Let forward observe."""
        self.observer_enabled[0] = int(enabled)

    def disable_observer(self) -> None:
        """Let forward leave the observer alone."""
        self.enable_observer(False)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Let forward put values on levels."""
        self.fake_quant_enabled[0] = int(enabled)

    def disable_fake_quant(self) -> None:
        """Let forward pass values as they are."""
        self.enable_fake_quant(False)

    def get_extra_state(self) -> torch.Tensor:
        """Both switches, uint8."""
        return torch.tensor([*self.observer_enabled, *self.fake_quant_enabled], dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.observer_enabled[0], self.fake_quant_enabled[0] = state.tolist()
