"""``AdaroundFakeQuantizer``: uniform fake-quantization whose rounding is learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import CompatError, TensorError
from ..ptq.rounding import initial_logits, rectified_sigmoid
from ._checks import checked
from ._module import SpanObserver, Switched

_PER_CHANNEL = (torch.per_channel_symmetric,)
_SYMMETRIC = (torch.per_tensor_symmetric, *_PER_CHANNEL)


class SymmetricMinMaxObserver(SpanObserver):
    """Scale and zero point of a symmetric affine grid that covers what was seen.

    Args:
        dtype: kept as an attribute.
        qscheme: ``torch.per_tensor_symmetric``, or ``per_channel_symmetric`` along ``ch_axis``.
        quant_min, quant_max: ends of the integer grid.
        reduce_range: halve both ends.

    torch's own observers fit in its place.

    >>> observer = SymmetricMinMaxObserver()
    >>> _ = observer(torch.tensor([-1.0, 0.5]))
    >>> [round(value.item(), 6) for value in observer.calculate_qparams()]  # 2 / 255
    [0.007843, 0]
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.qint8,
        qscheme: torch.qscheme = torch.per_tensor_symmetric,
        quant_min: int = -128,
        quant_max: int = 127,
        reduce_range: bool = False,
        ch_axis: int = 0,
    ) -> None:
        super().__init__(axis=ch_axis if qscheme in _PER_CHANNEL else None)
        self.dtype, self.qscheme = dtype, qscheme
        self.quant_min, self.quant_max = quant_min, quant_max
        if reduce_range:
            self.quant_min, self.quant_max = quant_min // 2, quant_max // 2

    def forward(self, x: Tensor) -> Tensor:
        """As for a whole tensor. Raises TensorError, too, where x has no axis ``ch_axis``, or other
        channels there than before."""
        if self.axis is not None:
            self._fit(x, self.axis)
        return super().forward(x)

    def _fit(self, x: Tensor, axis: int) -> None:
        """Take the number of channels from what comes first."""
        dims = checked(x, f"{type(self).__name__}: x").dim()
        if not -dims <= axis < dims:
            raise TensorError(
                f"{type(self).__name__}: x has shape {tuple(x.shape)} and no axis {axis}; give "
                "another ch_axis, or a per-tensor qscheme"
            )
        channels = x.shape[axis]
        if not self.low.dim():
            self.low, self.high = (end.expand(channels).clone() for end in (self.low, self.high))
        elif len(self.low) != channels:
            raise TensorError(
                f"{type(self).__name__}: x has {channels} channels on axis {axis}, but "
                f"{len(self.low)} before; every tensor wants an observer of its own"
            )

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32), 0-dim or one per channel."""
        scale = kernels.step_of(2 * self.span(), self.quant_max - self.quant_min)
        middle = (self.quant_min + self.quant_max + 1) // 2
        return scale, torch.full_like(scale, middle, dtype=torch.int32)


class AdaroundFakeQuantizer(Switched):
    """``(clamp(⌊x / scale⌋ + zero_point + h(V)) − zero_point) · scale``, V learned.

    Args:
        observer: makes what finds the scale, from all the keywords.
        qscheme: symmetric, per tensor or per channel along ``ch_axis``.
        quant_min, quant_max: ends of the integer grid.
        observer_kwargs: ``dtype``, ``reduce_range``, …

    Attributes:
        V: Parameter of x's shape; empty until observed, then h(V) is each value's own fraction, so
            that a soft result is the float value.
        use_soft_rounding: True: h is the rectified sigmoid in [0, 1]; False: 0 or 1, V ≥ 0.
        scale, zero_point: buffers; empty until observed.

    Raises CompatError (an AssertionError) for a scheme that is not symmetric, or ends in the wrong
    order.

    >>> fake = AdaroundFakeQuantizer(dtype=torch.qint8, quant_min=-2, quant_max=1)
    >>> x = torch.tensor([-1.0, 0.1, 0.5])
    >>> [round(value, 5) for value in fake(x).tolist()]
    [-1.0, 0.1, 0.5]
    >>> fake.disable_observer()
    >>> fake.use_soft_rounding = False
    >>> [round(value, 5) for value in fake(x).tolist()]
    [-0.66667, 0.0, 0.66667]
    """

    scale: Tensor
    zero_point: Tensor
    V: nn.Parameter
    grows = ("scale", "zero_point", "V")

    def __init__(
        self,
        observer: Callable[..., Any] = SymmetricMinMaxObserver,
        qscheme: torch.qscheme = torch.per_tensor_symmetric,
        quant_min: int = -128,
        quant_max: int = 127,
        ch_axis: int = 0,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if qscheme not in _SYMMETRIC or quant_min >= quant_max:
            raise CompatError(
                f"AdaroundFakeQuantizer: {qscheme}, {quant_min} to {quant_max}; a symmetric scheme "
                "and quant_min below quant_max are wanted"
            )
        self.qscheme, self.ch_axis = qscheme, ch_axis
        self.is_per_tensor = qscheme not in _PER_CHANNEL
        if not self.is_per_tensor:
            observer_kwargs["ch_axis"] = ch_axis
        self.activation_post_process = observer(
            qscheme=qscheme, quant_min=quant_min, quant_max=quant_max, **observer_kwargs
        )
        self.dtype = self.activation_post_process.dtype
        self.quant_min: int = self.activation_post_process.quant_min
        self.quant_max: int = self.activation_post_process.quant_max
        self.register_buffer("scale", torch.tensor([]))
        self.register_buffer("zero_point", torch.tensor([], dtype=torch.int32))
        self.V = nn.Parameter(torch.tensor([]))
        self.use_soft_rounding = True

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point in use."""
        return self.scale, self.zero_point

    def get_rectified_sigmoid_func(self) -> Tensor:
        """h(V): how far every value goes from the level below to the one above."""
        return rectified_sigmoid(self.V) if self.use_soft_rounding else (self.V >= 0).int()

    @torch.no_grad()
    def update_scale(self, X: Tensor, _scale: Tensor, _zero_point: Tensor) -> None:
        """Take a scale over, of a shape that broadcasts to X, and start V anew from X."""
        self.scale, self.zero_point = _scale.to(X.device), _zero_point.to(X.device)
        places = X / self.scale
        logits = initial_logits(places - places.floor())
        if self.V.shape == logits.shape:
            self.V.copy_(logits)
        else:
            self.V = nn.Parameter(logits)

    def forward(self, X: Tensor) -> Tensor:
        """X on the grid, of its shape; gradients go to V alone.

        Raises CompatError where no scale has been observed, TensorError for what is no float tensor
        or doesn't fit what was observed before.
        """
        checked(X, "AdaroundFakeQuantizer: X", "floating-point")
        if self.observer_enabled[0]:
            self._observe(X.detach())
        if not self.fake_quant_enabled[0]:
            return X
        if not self.scale.numel():
            raise CompatError(
                "AdaroundFakeQuantizer has no scale yet; call it with its observer enabled"
            )
        if X.shape != self.V.shape:
            raise TensorError(
                f"AdaroundFakeQuantizer: X has shape {tuple(X.shape)}, but V was learned for "
                f"{tuple(self.V.shape)}; enable its observer to start anew"
            )
        below = torch.floor(X.detach() / self.scale) + self.zero_point
        level = (below + self.get_rectified_sigmoid_func()).clamp(self.quant_min, self.quant_max)
        return (level - self.zero_point) * self.scale

    def _observe(self, X: Tensor) -> None:
        self.activation_post_process(X)
        scale, zero_point = self.activation_post_process.calculate_qparams()
        if not self.is_per_tensor:
            shape = [-1 if dim == self.ch_axis % X.dim() else 1 for dim in range(X.dim())]
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        self.update_scale(X, scale, zero_point)

    def extra_repr(self) -> str:
        return f"{self.quant_min} to {self.quant_max}, {self.qscheme}, V{tuple(self.V.shape)}"
