"""Scale and bias of a layer on integer levels, with batch norm folded in (contract 4.6)."""

from __future__ import annotations

import torch
from torch import nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def is_foldable(batch_norm: nn.Module) -> bool:
    """Whether a batch norm's eval form is one multiply and one add per channel."""
    return type(batch_norm) in BATCH_NORMS and getattr(batch_norm, "running_mean", None) is not None


def scale_and_bias(
    step_x: torch.Tensor | None,
    step_w: torch.Tensor,
    channels: int,
    bias: torch.Tensor | None,
    batch_norm: nn.Module | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``s`` and ``b`` of ``y = fl(fl(acc) · s) + b``.

    Args:
        step_x: the input's step, float32 scalar; None where activations are float.
        step_w: the weight's step, float32, ``()``, ``(C,)`` or ``(C, groups)``.
        channels: C, output channels.
        bias: ``(C,)`` or None.
        batch_norm: a foldable batch norm, or None.

    Returns:
        ``s``, float32, ``(C,)`` or ``(C, groups)``; ``b``, float32, ``(C,)``, never −0.0.
    """
    steps = step_w.expand(channels) if step_w.dim() == 0 else step_w
    if batch_norm is None:
        scale = steps if step_x is None else step_x * steps
        offset = torch.zeros(channels, device=steps.device) if bias is None else bias.float()
        return scale.contiguous(), offset + 0.0  # + 0.0 turns −0.0 into +0.0
    mean, gain, shift = _statistics(batch_norm)
    exact = steps.double() if step_x is None else step_x.double() * steps.double()
    per_channel = gain.reshape(-1, *[1] * (steps.dim() - 1))
    centred = (0.0 if bias is None else bias.double()) - mean
    return (exact * per_channel).float(), (shift + centred * gain).float() + 0.0


def _statistics(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """μ, g = γ / √(σ² + ε) and β, each float64 of shape (C,)."""
    assert isinstance(norm, BATCH_NORMS) and norm.running_mean is not None
    assert norm.running_var is not None
    deviation = torch.sqrt(norm.running_var.double() + norm.eps)
    gamma = torch.ones_like(deviation) if norm.weight is None else norm.weight.double()
    beta = torch.zeros_like(deviation) if norm.bias is None else norm.bias.double()
    return norm.running_mean.double(), gamma / deviation, beta
