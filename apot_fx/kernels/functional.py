"""Quantize, dequantize, fake-quantize and packing with their inputs checked: the public functions.

Under ``symbolic_trace`` (a Proxy comes in) nothing is checked and the operator itself is recorded.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from ..errors import TensorError, did_you_mean
from ..levels import LevelSet
from .reference import ALPHA_MAX, ALPHA_MIN

_GRADS = ("ste", "rcf")


def quantize(
    x: torch.Tensor,
    alpha: float | torch.Tensor,
    level_set: LevelSet,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """Indices of the nearest levels: ``level ≈ x · M / α``, ties to the lower level.

    Args:
        x: float tensor of any shape (bfloat16 and float16 are widened; float64 stays float64).
        alpha: clip value in the units of x: a float or scalar tensor; with ``axis`` of shape
            ``(x.shape[axis],)``; with ``group_size`` too, ``(x.shape[axis], groups)``.
        level_set: the levels.
        axis: channel axis, or None for one α.
        group_size: elements per α along the flattened other axes; the last group may be short.

    Returns:
        Indices of x's shape and strides, uint8 up to 256 levels, else int16. NaN gives the zero
        level, ±inf clips.

    Raises TensorError for another dtype, shape or an α outside [2^-40, 2^40].
    Source: Li, Dong, Wang, *Additive Powers-of-Two Quantization*, ICLR 2020, equation 3.

    >>> s = LevelSet.apot(bits=3, k=2, signed=True)
    >>> quantize(torch.tensor([-2.0, 0.1, 0.3, 1.0]), 1.0, s).tolist()
    [0, 3, 4, 6]
    """
    clip = _check("quantize", x, alpha, level_set, axis, group_size)
    index: torch.Tensor = torch.ops.apot_fx.quantize(x, clip, level_set.spec, axis, group_size)
    return index


def dequantize(
    index: torch.Tensor,
    alpha: float | torch.Tensor,
    level_set: LevelSet,
    axis: int | None = None,
    group_size: int | None = None,
) -> torch.Tensor:
    """``level · α / M`` of indices; float32, or float64 where α is. Differentiable in α.

    Args as for :func:`quantize`. Raises TensorError too where an index is not below ``len``.

    >>> s = LevelSet.apot(bits=3, k=2, signed=True)
    >>> dequantize(torch.tensor([0, 3, 6], dtype=torch.uint8), 1.0, s).tolist()
    [-1.0, 0.0, 1.0]
    """
    clip = _check("dequantize", index, alpha, level_set, axis, group_size, integers=True)
    values: torch.Tensor = torch.ops.apot_fx.dequantize(
        index, clip, level_set.spec, axis, group_size
    )
    return values


def fake_quantize(
    x: torch.Tensor,
    alpha: float | torch.Tensor,
    level_set: LevelSet,
    axis: int | None = None,
    group_size: int | None = None,
    grad: str = "ste",
) -> torch.Tensor:
    """``dequantize(quantize(x))`` of x's dtype, with a gradient; NaN passes.

    Args as for :func:`quantize`, and ``grad``: ``"ste"`` (straight-through: 1 inside the clip
    range, 0 outside, none for α) or ``"rcf"`` (the same for x; for α ``q_max/M`` above,
    ``q_min/M`` below, ``q/M − x/α`` inside).

    Source: the same paper, section 2.3 (reparameterized clipping function).

    >>> s = LevelSet.apot(bits=3, k=2, signed=True)
    >>> alpha = torch.tensor(1.0, requires_grad=True)
    >>> fake_quantize(torch.tensor([-2.0, 0.1, 0.3]), alpha, s, grad="rcf").sum().backward()
    >>> round(alpha.grad.item(), 3)
    -1.15
    """
    if grad not in _GRADS:
        raise TensorError(
            f"fake_quantize: unknown grad {grad!r} (ste, rcf).{did_you_mean(str(grad), _GRADS)}"
        )
    clip = _check("fake_quantize", x, alpha, level_set, axis, group_size)
    y: torch.Tensor = torch.ops.apot_fx.fake_quantize(
        x, clip, level_set.spec, axis, group_size, grad
    )
    return y


def pack(index: torch.Tensor, bits: int) -> torch.Tensor:
    """Indices as a little-endian bit stream of ``ceil(numel · bits / 8)`` bytes, uint8, 1-d.

    Raises TensorError for bits outside 1 … 15, and for values that don't fit into them.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    _check_bits("pack", bits)
    if not isinstance(index, fx.Proxy):
        _check_integers("pack", index)
        if readable(index) and index.numel():
            low, high = (int(end) for end in index.aminmax())
            if low < 0 or high >= 2**bits:
                raise TensorError(
                    f"pack: values from {low} to {high} do not fit into {bits} bits; "
                    f"{max(high, 1).bit_length()} would hold them"
                )
    packed: torch.Tensor = torch.ops.apot_fx.pack(index, bits)
    return packed


def unpack(packed: torch.Tensor, bits: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The indices that :func:`pack` packed, of ``shape``; uint8 up to 8 bits, else int16.

    Raises TensorError where the byte count does not fit the shape.

    >>> unpack(torch.tensor([33, 3], dtype=torch.uint8), 4, (3,)).tolist()
    [1, 2, 3]
    """
    _check_bits("unpack", bits)
    if not isinstance(packed, fx.Proxy):
        wanted = (math.prod(shape) * bits + 7) // 8
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != wanted:
            raise TensorError(
                f"unpack: {tuple(packed.shape)} {packed.dtype} given, but {tuple(shape)} at {bits} "
                f"bits takes {wanted} bytes of torch.uint8"
            )
    index: torch.Tensor = torch.ops.apot_fx.unpack(packed, bits, list(shape))
    return index


def _check(
    verb: str,
    x: torch.Tensor,
    alpha: float | torch.Tensor,
    level_set: LevelSet,
    axis: int | None,
    group_size: int | None,
    integers: bool = False,
) -> Any:
    """α as a tensor, once everything is as it should be."""
    if not isinstance(level_set, LevelSet):
        raise TensorError(
            f"{verb}: level_set is a {type(level_set).__name__}; pass a LevelSet (LevelSet.apot())"
        )
    if isinstance(x, fx.Proxy) or isinstance(alpha, fx.Proxy):
        return alpha if not isinstance(alpha, float) else torch.tensor(alpha)
    if integers:
        _check_integers(verb, x)
        _check_range(verb, x, level_set)
    elif not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TensorError(f"{verb}: x is {kind}; a floating-point tensor is wanted")
    clip = _alpha_tensor(verb, x, alpha)
    _check_shape(verb, x, clip, axis, group_size)
    return clip


def _alpha_tensor(verb: str, x: torch.Tensor, alpha: float | torch.Tensor) -> torch.Tensor:
    if isinstance(alpha, torch.Tensor):
        if not alpha.is_floating_point():
            raise TensorError(f"{verb}: alpha is {alpha.dtype}; a floating-point tensor is wanted")
        if readable(alpha) and bool(alpha.isnan().any()):
            raise TensorError(f"{verb}: alpha holds NaN")
        return alpha
    if not isinstance(alpha, (int, float)) or not ALPHA_MIN <= alpha <= ALPHA_MAX:
        raise TensorError(f"{verb}: alpha is {alpha!r}; a number in [2^-40, 2^40] is wanted")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.tensor(float(alpha), dtype=dtype, device=x.device)


def _check_shape(
    verb: str, x: torch.Tensor, alpha: torch.Tensor, axis: int | None, group_size: int | None
) -> None:
    if axis is None:
        if group_size is not None:
            raise TensorError(f"{verb}: group_size needs axis, the channel axis")
        if alpha.numel() != 1:
            raise TensorError(
                f"{verb}: alpha has shape {tuple(alpha.shape)} without axis; pass axis, or one α"
            )
        return
    if not -x.dim() <= axis < x.dim():
        raise TensorError(f"{verb}: axis {axis} of a {x.dim()}-d tensor")
    channels = x.shape[axis]
    wanted: tuple[int, ...] = (channels,)
    if group_size is not None:
        if group_size < 1:
            raise TensorError(f"{verb}: group_size is {group_size}; 1 or more is wanted")
        rest = math.prod(size for dim, size in enumerate(x.shape) if dim != axis % x.dim())
        wanted = (channels, -(-rest // group_size))
    if tuple(alpha.shape) != wanted:
        raise TensorError(f"{verb}: alpha has shape {tuple(alpha.shape)}, expected {wanted}")


def _check_bits(verb: str, bits: int) -> None:
    if not isinstance(bits, int) or not 1 <= bits <= 15:
        raise TensorError(f"{verb}: bits is {bits!r}; 1 to 15 are possible")


def _check_integers(verb: str, index: torch.Tensor) -> None:
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    if not isinstance(index, torch.Tensor) or index.dtype not in kinds:
        kind = index.dtype if isinstance(index, torch.Tensor) else type(index).__name__
        raise TensorError(f"{verb}: index is {kind}; an integer tensor is wanted")


def _check_range(verb: str, index: torch.Tensor, level_set: LevelSet) -> None:
    if not readable(index) or not index.numel():
        return
    low, high = (int(end) for end in index.aminmax())
    if low < 0 or high >= len(level_set):
        raise TensorError(
            f"{verb}: indices from {low} to {high}, but {level_set} has {len(level_set)} levels"
        )


def readable(x: torch.Tensor) -> bool:
    """Whether values may be looked at: not while compiling or on fake and meta tensors."""
    fake = isinstance(x, torch._subclasses.FakeTensor) or x.is_meta
    return not (fake or torch.compiler.is_compiling())
