"""The order in which gradients of α are summed, which is part of the contract on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as functional

from .layout import dense, memory_order, rows_of

#: The order of sums: lanes within blocks of values, then blocks, then runs in blocks of runs.
_LANES, _BLOCK, _RUNS = 32, 4096, 64


def reduce_to_alpha(
    values: torch.Tensor, alpha: torch.Tensor, axis: int | None, group_size: int | None
) -> torch.Tensor:
    """Sum per α, float64 of α's shape; the counterpart of :func:`reference.spread`.

    On the CPU in the order that docs/arithmetic.md gives, whatever the number of threads.
    """
    runs = _runs(values.double(), axis, group_size)
    if values.device.type != "cpu":
        return runs.sum((0, 2)).reshape(alpha.shape)
    runs = _in_order(_block_sums(runs)) if runs.shape[2] != 1 else runs.squeeze(2)
    runs = functional.pad(runs, (0, 0, 0, -len(runs) % _RUNS)).unflatten(0, (-1, _RUNS))
    return _in_order(_in_order(runs.transpose(1, 2)).T).reshape(alpha.shape)


def _runs(values: torch.Tensor, axis: int | None, group_size: int | None) -> torch.Tensor:
    """Values as outer × channels × inner, in the order of memory; short groups filled up."""
    if group_size is not None:
        return rows_of(values, axis, group_size).unsqueeze(0)
    values, layout = dense(values, axis)
    order = memory_order(values) or []
    return values.permute(order + [d for d in range(values.dim()) if d not in order]).reshape(
        layout.outer, layout.channels, layout.inner
    )


def _block_sums(runs: torch.Tensor) -> torch.Tensor:
    """Sums of blocks of a run, each in lanes that are joined in halves at the end."""
    blocks = functional.pad(runs, (0, -runs.shape[2] % _BLOCK)).unflatten(2, (-1, _BLOCK))
    lanes = _in_order(blocks.unflatten(3, (-1, _LANES)).transpose(3, 4))
    while lanes.shape[-1] > 1:
        lanes = lanes[..., : lanes.shape[-1] // 2] + lanes[..., lanes.shape[-1] // 2 :]
    return lanes.squeeze(-1)


def _in_order(values: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension, one value after the other."""
    total = values.new_zeros(values.shape[:-1])
    for value in values.unbind(-1):
        total += value
    return total
