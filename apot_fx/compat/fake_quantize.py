"""``APoTFakeQuantize``: an observer, then fake-quantization by what it saw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import CompatError
from ._checks import QPARAMS, checked
from ._module import Switched
from .fake_quantize_function import fake_quantize_function
from .observer import APoTObserver


class APoTFakeQuantize(Switched):
    """Observe, then put values on the levels; both can be switched off.

    Args:
        observer: makes the observer, from the keywords.
        observer_kwargs: ``b``, ``k`` and ``dtype`` of :class:`APoTObserver`.

    Attributes:
        activation_post_process: the observer; its min_val and max_val can be set.
        alpha, gamma, quantization_levels, level_indices: buffers, None until first observed.

    In a graph, :func:`apot_fx.prepare_apot` with a QConfig places the library's own fake-quants.

    >>> import torch
    >>> fake = APoTFakeQuantize(b=4, k=2)
    >>> fake(torch.tensor([0.0, 0.4, 1.0])).tolist()
    [0.0, 0.375, 1.0]
    >>> fake.disable_observer()
    >>> fake(torch.tensor([9.0])).tolist(), fake.alpha.item()
    ([1.0], 1.0)
    """

    alpha: Tensor | None
    gamma: Tensor | None
    quantization_levels: Tensor | None
    level_indices: Tensor | None
    grows = QPARAMS

    def __init__(self, observer: Callable[..., Any] = APoTObserver, **observer_kwargs: Any) -> None:
        super().__init__()
        self.activation_post_process = observer(**observer_kwargs)
        self.dtype = self.activation_post_process.dtype
        for name in QPARAMS:
            self.register_buffer(name, None)

    def calculate_qparams(self, signed: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the observer calculates: α, γ, levels and codes; raises as it does."""
        qparams: tuple[Tensor, Tensor, Tensor, Tensor]
        qparams = self.activation_post_process.calculate_qparams(signed=signed)
        return qparams

    def forward(self, X: Tensor, signed: bool = False) -> Tensor:
        """X's levels, of its shape and dtype, by :class:`fake_quantize_function`.

        Args:
            X: float, any shape.
            signed: whether the observed levels are signed; without effect while the observer is
                off.

        Raises CompatError (an AssertionError) where nothing has been observed, TensorError for what
        is no float tensor.
        """
        checked(X, "APoTFakeQuantize: X", "floating-point")
        if self.observer_enabled[0]:
            self.activation_post_process(X)
            if X.numel():
                qparams = self.calculate_qparams(signed)
                self.alpha, self.gamma, self.quantization_levels, self.level_indices = qparams
        if not self.fake_quant_enabled[0] or not X.numel():
            return X
        known = (self.alpha, self.gamma, self.quantization_levels, self.level_indices)
        if any(value is None for value in known):
            raise CompatError(
                "APoTFakeQuantize has no qparams yet; call it on data with its observer enabled"
            )
        result: Tensor = fake_quantize_function.apply(X, *known)
        return result
