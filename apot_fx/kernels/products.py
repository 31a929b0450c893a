"""Linear, convolutions, matmul and einsum on integer-valued floats (contract 4.6 to 4.8, 4.10).

Sums of products of integers are exact in float32 up to 2^24 on an engine that only multiplies and
adds. Where the engine is not known to be one (NNPACK's and Winograd's transforms, lowered matmul
precision, other devices), or the sum may be larger, everything runs in float64.
"""

from __future__ import annotations

import platform
from collections.abc import Callable

import torch
import torch.nn.functional as functional

_LANES = 16
_CHUNK = 2**24  # elements that the weight-only sum works on at a time


def _sum_dtype(x: torch.Tensor, wide: bool) -> torch.dtype:
    exact = (
        not wide
        and x.device.type == "cpu"
        and platform.machine().lower() in ("x86_64", "amd64")
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.get_float32_matmul_precision() == "highest"
    )
    return torch.float32 if exact else torch.float64


def _per_channel(values: torch.Tensor, rank: int) -> torch.Tensor:
    return values.reshape([-1, *[1] * rank])


def linear(
    x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, wide: bool
) -> torch.Tensor:
    """``fl(fl(x @ wᵀ) · s) + b``."""
    dtype = _sum_dtype(x, wide)
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.to(dtype), w.to(dtype)).float() * s + b


def matmul(a: torch.Tensor, b: torch.Tensor, s: torch.Tensor, wide: bool) -> torch.Tensor:
    """``fl(fl(a @ b) · s) + 0.0``, of every rank that torch.matmul takes; s is a scalar."""
    dtype = _sum_dtype(a, wide)
    with torch.autocast(a.device.type, enabled=False):
        return torch.matmul(a.to(dtype), b.to(dtype)).float() * s + 0.0


def einsum(
    a: torch.Tensor, b: torch.Tensor, s: torch.Tensor, equation: str, wide: bool
) -> torch.Tensor:
    """``fl(fl(acc) · s) + 0.0`` with acc the einsum of two operands; s is a scalar."""
    dtype = _sum_dtype(a, wide)
    with torch.autocast(a.device.type, enabled=False):
        total: torch.Tensor = torch.einsum(equation, a.to(dtype), b.to(dtype))
        return total.float() * s + 0.0


def _like_input(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``y`` in the memory format of a batched ``x``, channels last or contiguous.

    Engines also look at the weight's format, and float64 ones leave channels last; but results
    must be laid out alike however a stage holds its weight and whichever dtype sums are exact in.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    kind = formats.get(y.dim(), torch.contiguous_format)
    if y.dim() != x.dim() or x.is_contiguous() or not x.is_contiguous(memory_format=kind):
        kind = torch.contiguous_format
    out = torch.empty(y.shape, dtype=y.dtype, device=y.device, memory_format=kind)
    return y if y.stride() == out.stride() else out.copy_(y)


def _convolve(
    x: torch.Tensor,
    w: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wide: bool,
) -> torch.Tensor:
    dtype = _sum_dtype(x, wide)
    call = (functional.conv1d, functional.conv2d, functional.conv3d)[w.dim() - 3]
    with torch.autocast(x.device.type, enabled=False):
        sums = call(x.to(dtype), w.to(dtype), None, stride, padding, dilation, groups)
        return _like_input(sums.float(), x)


def swap_channels(w: torch.Tensor, groups: int) -> torch.Tensor:
    """A transposed convolution's weight with output channels first, and back.

    ``(in, out/groups, …)`` ↔ ``(out, in/groups, …)``; within its group only, so it is its own
    inverse.
    """
    return w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _convolve_transposed(
    x: torch.Tensor,
    w: torch.Tensor,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
    wide: bool,
) -> torch.Tensor:
    dtype = _sum_dtype(x, wide)
    calls = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)
    call, stored = calls[w.dim() - 3], swap_channels(w, groups).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        sums = call(x.to(dtype), stored, None, stride, padding, output_padding, groups, dilation)
        return _like_input(sums.float(), x)


def _scaled(total: torch.Tensor, s: torch.Tensor, b: torch.Tensor, rank: int) -> torch.Tensor:
    return total * _per_channel(s, rank) + _per_channel(b, rank)


def conv(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    wide: bool,
) -> torch.Tensor:
    """``fl(fl(x * w) · s) + b``, 1-d to 3-d, batched or not."""
    total = _convolve(x, w, stride, padding, dilation, groups, wide)
    return _scaled(total, s, b, w.dim() - 2)


def conv_transpose(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
    wide: bool,
) -> torch.Tensor:
    """The same transposed; ``w`` has output channels first, ``(out, in/groups, …)``."""
    geometry = (stride, padding, output_padding, dilation, groups)
    return _scaled(_convolve_transposed(x, w, *geometry, wide), s, b, w.dim() - 2)


def linear_grouped(
    x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor, group_size: int, wide: bool
) -> torch.Tensor:
    """``((fl(fl(acc_0) · s_0) + fl(fl(acc_1) · s_1)) + …) + b``, groups along the last axis."""
    dtype = _sum_dtype(x, wide)
    parts = zip(x.split(group_size, -1), w.split(group_size, -1), s.unbind(1), strict=True)
    total = x.new_zeros((), dtype=torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        for inputs, weights, scale in parts:
            total = total + functional.linear(inputs.to(dtype), weights.to(dtype)).float() * scale
    return total + b


def _grouped(
    convolve: Callable[[torch.Tensor], torch.Tensor],
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    group_size: int,
) -> torch.Tensor:
    """As :func:`linear_grouped`, groups along the flattened (input channel, kernel) axis."""
    rank, flat = w.dim() - 2, w.flatten(1)
    place = torch.arange(flat.shape[1], device=w.device) // group_size
    total = w.new_zeros((), dtype=torch.float32)
    for group, scale in enumerate(s.unbind(1)):
        sums = convolve(torch.where(place == group, flat, 0.0).reshape(w.shape))
        total = total + sums * _per_channel(scale, rank)
    return total + _per_channel(b, rank)


def conv_grouped(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    group_size: int,
    wide: bool,
) -> torch.Tensor:
    """As :func:`conv`, with group scales."""

    def convolve(part: torch.Tensor) -> torch.Tensor:
        return _convolve(x, part, stride, padding, dilation, groups, wide)

    return _grouped(convolve, w, s, b, group_size)


def conv_transpose_grouped(
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor,
    b: torch.Tensor,
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
    group_size: int,
    wide: bool,
) -> torch.Tensor:
    """As :func:`conv_transpose`, with group scales."""
    geometry = (stride, padding, output_padding, dilation, groups)

    def convolve(part: torch.Tensor) -> torch.Tensor:
        return _convolve_transposed(x, part, *geometry, wide)

    return _grouped(convolve, w, s, b, group_size)


def linear_weight_only(
    x: torch.Tensor, w: torch.Tensor, step: torch.Tensor, b: torch.Tensor, group_size: int
) -> torch.Tensor:
    """Float activations times levels in one fixed order, whatever the threads, batch or CPU.

    Within a group, position k belongs to lane k mod 16. Every lane adds its products in ascending
    k (multiply, then add, each rounded); then ``out_l += fl(lane_l · step)``, groups ascending;
    the 16 lanes are halved by adding the upper half to the lower (8, 4, 2, 1); b comes last.
    Groups are filled up with zeros to a multiple of 16.
    """
    rows, steps = x.reshape(-1, x.shape[-1]), step.reshape(len(w), -1)
    inputs, weights = _in_lanes(rows, group_size), _in_lanes(w, group_size)
    size = max(1, _CHUNK // max(1, len(w) * inputs.shape[2] * _LANES))
    parts = [_lane_sums(part, weights, steps) for part in inputs.split(size, dim=1)]
    out = torch.cat(parts) if parts else rows.new_zeros(0, len(w))
    return out.reshape(*x.shape[:-1], len(w)) + b


def _in_lanes(rows: torch.Tensor, group_size: int) -> torch.Tensor:
    """(R, K) to (turns, R, groups, 16)."""
    grouped = functional.pad(rows, (0, -rows.shape[1] % group_size)).unflatten(1, (-1, group_size))
    filled = functional.pad(grouped, (0, -group_size % _LANES))
    return filled.unflatten(2, (-1, _LANES)).permute(2, 0, 1, 3)


def _lane_sums(x: torch.Tensor, w: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """(turns, R, groups, 16) and (turns, O, groups, 16) to (R, O)."""
    lanes = x.new_zeros(x.shape[1], w.shape[1], x.shape[2], _LANES)
    for inputs, weights in zip(x, w, strict=True):
        lanes = lanes + inputs.unsqueeze(1) * weights
    scaled = lanes * steps.unsqueeze(-1)
    out = torch.zeros_like(scaled[:, :, 0])
    for group in scaled.unbind(2):
        out = out + group
    while out.shape[-1] > 1:
        lower, upper = out.chunk(2, dim=-1)
        out = lower + upper
    return out.squeeze(-1)
