"""Average pools on levels: exact sums of integers, then one multiplication (contract 4.9)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as functional

from ..errors import TensorError
from ..fake_quant import FakeQuantize
from ..kernels import step_of
from .op import ConvertedOp, PreparedOp, with_gradient_of
from .quantize import Quantize


@dataclasses.dataclass(frozen=True)
class Pool:
    """The geometry of an average pool over the trailing ``rank`` axes.

    ``kind`` is ``"window"`` (with kernel, stride, padding), ``"adaptive"`` (with output sizes,
    None keeping an axis) or ``"mean"`` (each axis as a whole, kept or not).
    """

    kind: str
    rank: int
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None
    output: tuple[int | None, ...] = ()
    keepdim: bool = False

    def plain(self, x: torch.Tensor) -> torch.Tensor:
        """The float pool that torch computes."""
        if self.kind == "mean":
            return x.mean(tuple(range(-self.rank, 0)), keepdim=self.keepdim)
        if self.kind == "adaptive":
            pools = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d)
            output = [size if size is not None else x.shape[a - self.rank]
                      for a, size in enumerate(self.output)]  # fmt: skip
            return pools[self.rank - 1](x, output)  # type: ignore[arg-type]
        options = (self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        if self.rank == 1:
            return functional.avg_pool1d(x, *options)
        return functional.avg_pool2d(x, *options, self.divisor)

    def exact(self, levels: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """``sum · fl(step / count)`` with each window's own count; float32."""
        total, counts = levels.double(), torch.ones((), dtype=torch.float64)
        for axis in range(-self.rank, 0):
            starts, ends, sizes = self._windows(axis + self.rank, levels.shape[axis])
            total = _window_sums(total, axis, starts, ends)
            shape = [-1] + [1] * (-1 - axis)
            counts = counts * torch.tensor(sizes, dtype=torch.float64).reshape(shape)
        if self.divisor is not None:
            counts = torch.full_like(counts, float(self.divisor))
        pooled = total.float() * (step / counts.float().to(step.device))
        if self.kind == "mean" and not self.keepdim:
            pooled = pooled.flatten(-self.rank).squeeze(-1)
        return pooled

    def _windows(self, axis: int, size: int) -> tuple[list[int], list[int], list[int]]:
        """Where windows start and end on an axis, clipped to it, and what each counts as."""
        if self.kind == "mean":
            return [0], [size], [size]
        if self.kind == "adaptive":
            count = self.output[axis] or size
            starts = [i * size // count for i in range(count)]
            ends = [-((-(i + 1) * size) // count) for i in range(count)]
            return starts, ends, [end - start for start, end in zip(starts, ends, strict=True)]
        kernel, stride, padding = self.kernel[axis], self.stride[axis], self.padding[axis]
        span = size + 2 * padding - kernel
        count = (-(-span // stride) if self.ceil_mode else span // stride) + 1
        if self.ceil_mode and (count - 1) * stride >= size + padding:
            count -= 1  # torch: a window must start inside the input or its left padding
        first = [i * stride - padding for i in range(count)]
        last = [min(start + kernel, size + padding) for start in first]
        starts = [max(start, 0) for start in first]
        ends = [min(end, size) for end in last]
        padded = self.count_include_pad
        edges = zip(first, last, strict=True) if padded else zip(starts, ends, strict=True)
        return starts, ends, [end - start for start, end in edges]


def _window_sums(x: torch.Tensor, axis: int, starts: list[int], ends: list[int]) -> torch.Tensor:
    """Sums over [start, end) of integer-valued float64: exact, by differences of prefix sums."""
    prefix = functional.pad(x.cumsum(axis), [0, 0] * (-1 - axis) + [1, 0])
    upper = prefix.index_select(axis, torch.tensor(ends, device=x.device))
    return upper - prefix.index_select(axis, torch.tensor(starts, device=x.device))


class PreparedPool(PreparedOp):
    """Torch's pool in train; in eval the sum of levels, as the converted form computes it."""

    kind = "average pool"

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: torch.Tensor, fake_quant: FakeQuantize | None = None) -> torch.Tensor:
        if self.training or fake_quant is None or not fake_quant.quantizes:
            return self.pool.plain(x)
        _check_rank(self.pool, x)
        alpha = fake_quant.clamped_alpha()
        levels = torch.ops.apot_fx.to_levels(x, alpha, fake_quant.level_spec)
        pooled = self.pool.exact(levels, fake_quant.step())
        if torch.is_grad_enabled() and x.requires_grad:
            return with_gradient_of(pooled, self.pool.plain(x))
        return pooled


class ConvertedPool(ConvertedOp):
    """The pool of an index tensor; child ``grid`` is its quantizer."""

    kind = "average pool"
    input_spec: str

    def __init__(self, op: PreparedPool, fake_quant: FakeQuantize, batch_norm: None) -> None:
        super().__init__()
        self.pool = op.pool
        self.grid = Quantize(fake_quant.alpha, fake_quant.known_level_set())
        self.input_spec = self.grid.level_spec

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        _check_rank(self.pool, x)
        levels = torch.ops.apot_fx.levels(x, self.input_spec)
        return self.pool.exact(levels, step_of(self.grid.alpha, self.grid.level_set.unit))


def _check_rank(pool: Pool, x: torch.Tensor) -> None:
    if pool.kind == "mean" and x.dim() != pool.rank + 2:
        raise TensorError(
            f"mean over {pool.rank} spatial axes got {x.dim()}-d input; leave it in float"
        )
