"""Observers: they see tensors and propose α (the clip value).

Statistics are buffers of their final shape from the start, so that state_dicts always fit.
Non-finite values are ignored. Under ``torch.distributed`` every batch's statistics are those of all
ranks' batches together, so observers stay alike on every rank; every rank must observe in step.
"""

from __future__ import annotations

import abc

import torch
from torch import nn

from .collectives import largest_of_ranks, several_ranks, sum_of_ranks
from .config import ACTIVATION_OBSERVERS, check_choice
from .errors import CalibrationError, TensorError
from .kernels import ALPHA_MAX, ALPHA_MIN, eager, reference
from .kernels.dispatch import Led
from .kernels.layout import rows_of
from .kernels.reference import BINS, SUB_BITS
from .levels import LevelSet


def covering_alpha(
    low: torch.Tensor, high: torch.Tensor, limits: tuple[int, int, int]
) -> torch.Tensor:
    """The smallest α whose range ``[q_min, q_max] · α/M`` holds [low, high], within α's limits.

    ``limits``: M, q_min and q_max. An unsigned set looks at ``high`` alone.
    """
    unit, q_min, q_max = limits
    alpha = torch.zeros_like(high)
    if q_max > 0:
        alpha = high.clamp(min=0) * (unit / q_max)
    if q_min < 0:
        alpha = torch.maximum(alpha, (-low).clamp(min=0) * (unit / -q_min))
    return alpha.clamp(ALPHA_MIN, ALPHA_MAX)


def _limits(spec: str) -> tuple[int, int, int]:
    """Unit, smallest and largest level of a set."""
    level_set = LevelSet.parse(spec)
    return level_set.unit, level_set.q_min, level_set.q_max


#: The same for a compiler, which can't look into a level set.
_fixed_limits = torch.compiler.assume_constant_result(_limits)


def _of_ranks(ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest values over all ranks."""
    joined = largest_of_ranks(torch.stack((-ends[0], ends[1])))
    return -joined[0], joined[1]


class Observer(nn.Module, abc.ABC):
    """Base of the observers.

    Args:
        shape: of α: ``()`` per tensor, ``(C,)`` per channel, ``(C, groups)`` per group.
        axis, group_size: which elements belong to which α, as for :func:`apot_fx.quantize`.

    Buffers: ``low``, ``high`` (float32, of ``shape``): the smallest and largest finite value seen.
    ``zeros_are_filler``: zeros alone (a default state) tell no range; they count until others come.
    """

    low: torch.Tensor
    high: torch.Tensor
    zeros_are_filler = False

    def __init__(
        self, shape: tuple[int, ...] = (), axis: int | None = None, group_size: int | None = None
    ) -> None:
        super().__init__()
        self.axis, self.group_size = axis, group_size
        self.register_buffer("low", torch.full(shape, float("inf")))
        self.register_buffer("high", torch.full(shape, -float("inf")))

    @property
    def seen(self) -> bool:
        """Whether any finite value was observed."""
        return bool((self.high >= self.low).any())

    @property
    def seen_only_zeros(self) -> bool:
        """Whether every finite value observed was zero, and there was one."""
        return self.seen and not bool(self.low.any() or self.high.any())

    def is_signed(self) -> bool:
        """Whether a negative value was observed."""
        return bool((self.low < 0).any())

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Observe ``x`` and return it unchanged."""
        self.update(x.detach())
        return x

    def update(self, x: torch.Tensor) -> None:
        """Take in one batch. It may hold no finite value, or none at all: another rank's may, and
        the ranks' statistics are joined in here."""
        self._widen(*self._ends(x))

    def _ends(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest finite value per α, over all ranks; inf and −inf for none."""
        one = self.axis is None
        return _of_ranks(torch.ops.apot_fx.ends(x) if one else reference.ends(self._rows(x)))

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return rows_of(x.float(), self.axis, self.group_size)

    def follow(
        self, x: torch.Tensor, spec: str, alpha: torch.Tensor, nan_to_zero: bool
    ) -> torch.Tensor | None:
        """Observe ``x`` and write the α then proposed for a level set into ``alpha``.

        Returns the fake-quantized ``x`` where it came along the way, as with ``nan_to_zero``.
        """
        self(x)
        with torch.no_grad():
            alpha.copy_(self._alpha_of(spec))
        return None

    def _alpha_of(self, spec: str) -> torch.Tensor:
        return self.propose(LevelSet.parse(spec))

    def _widen(self, low: torch.Tensor, high: torch.Tensor) -> None:
        self.low.copy_(torch.minimum(self.low, low.reshape(self.low.shape)))
        self.high.copy_(torch.maximum(self.high, high.reshape(self.high.shape)))

    def propose(self, level_set: LevelSet) -> torch.Tensor:
        """α for a level set, float32, of ``shape``, within [2^-40, 2^40]."""
        return self._covering(_limits(level_set.spec))

    def _covering(self, limits: tuple[int, int, int]) -> torch.Tensor:
        seen = self.high >= self.low
        zero = torch.zeros_like(self.low)
        low, high = torch.where(seen, self.low, zero), torch.where(seen, self.high, zero)
        return covering_alpha(low, high, limits)

    def reset(self) -> None:
        """Forget everything."""
        self.low.fill_(float("inf"))
        self.high.fill_(-float("inf"))

    def merge(self, other: Observer) -> None:
        """Add what another observer of this kind and shape saw: exact, in any order and grouping.

        Raises CalibrationError where the kind can't be merged.
        """
        if self.zeros_are_filler and other.seen:
            if other.seen_only_zeros and self.seen:
                return
            if self.seen_only_zeros:
                self.reset()
        self._add(other)

    def _add(self, other: Observer) -> None:
        self._widen(other.low.to(self.low.device), other.high.to(self.high.device))


class MinMaxObserver(Observer):
    """α covers everything seen."""

    constant = 0.0

    def follow(
        self, x: torch.Tensor, spec: str, alpha: torch.Tensor, nan_to_zero: bool
    ) -> torch.Tensor | None:
        if not several_ranks():
            led = Led(self.low, self.high, self.constant)
            y = eager.follow(x, alpha, spec, led, nan_to_zero)
            if y is not None:
                return y
        return super().follow(x, spec, alpha, nan_to_zero)

    def _alpha_of(self, spec: str) -> torch.Tensor:
        return self._covering(_fixed_limits(spec))


class MovingAverageObserver(MinMaxObserver):
    """α covers a moving average of each batch's range: ``ends += 0.1 · (batch's ends − ends)``.

    The first batch starts the average. It depends on the order of batches, so it can't be merged.
    """

    constant = 0.1

    def update(self, x: torch.Tensor) -> None:
        for kept, new in zip((self.low, self.high), self._ends(x), strict=True):
            new = new.reshape(kept.shape)
            moved = kept + self.constant * (new - kept)
            kept.copy_(torch.where(new.isinf(), kept, torch.where(kept.isinf(), new, moved)))

    def merge(self, other: Observer) -> None:
        raise CalibrationError(
            "a moving average depends on the order of batches and can't be merged; prepare with "
            "ActivationSpec(observer='minmax'), 'percentile' or 'mse'"
        )


class HistogramObserver(Observer):
    """Counts of magnitudes in fixed bins, 32 an octave, per sign; order and merging are exact.

    Buffer ``counts``: int64, ``(*shape, 2, bins)``: positive then negative values. Magnitudes
    below 2^-40 fall into the first bin, above 2^40 into the last.
    """

    counts: torch.Tensor

    def __init__(
        self, shape: tuple[int, ...] = (), axis: int | None = None, group_size: int | None = None
    ) -> None:
        super().__init__(shape, axis, group_size)
        self.register_buffer("counts", torch.zeros(*shape, 2, BINS, dtype=torch.int64))

    def update(self, x: torch.Tensor) -> None:
        if self.axis is None:
            ends, counts = torch.ops.apot_fx.histogram(x)
        else:
            rows = self._rows(x)
            ends, counts = reference.ends(rows), reference.histogram(rows)
        self._widen(*_of_ranks(ends))
        self.counts += sum_of_ranks(counts).reshape(self.counts.shape)

    def reset(self) -> None:
        super().reset()
        self.counts.zero_()

    def _add(self, other: Observer) -> None:
        assert isinstance(other, HistogramObserver)
        super()._add(other)
        self.counts += other.counts.to(self.counts.device)

    def _magnitudes(self, level_set: LevelSet) -> torch.Tensor:
        """Counts per α and magnitude bin, float64, of the signs that the set can hold."""
        counts = self.counts.reshape(-1, 2, BINS).double()
        return counts[:, 0] + counts[:, 1] if level_set.signed else counts[:, 0]


def _edges(device: torch.device) -> torch.Tensor:
    """Lower edges of the magnitude bins and the upper edge of the last, float64."""
    place = torch.arange(BINS + 1, device=device)
    octave, part = place >> SUB_BITS, place & ((1 << SUB_BITS) - 1)
    return torch.ldexp(1 + part.double() / (1 << SUB_BITS), octave - 40)


class PercentileObserver(HistogramObserver):
    """α is the magnitude that 99.99 % of the values do not exceed, to within a bin."""

    percentile = 99.99

    def propose(self, level_set: LevelSet) -> torch.Tensor:
        counts = self._magnitudes(level_set)
        wanted = counts.sum(1, keepdim=True) * (self.percentile / 100)
        place = torch.searchsorted(counts.cumsum(1), wanted).squeeze(1).clamp(max=BINS - 1)
        edge = _edges(counts.device)[1:][place].float().reshape(self.low.shape)
        return torch.minimum(edge, super().propose(level_set)).clamp(ALPHA_MIN, ALPHA_MAX)


class MSEObserver(HistogramObserver):
    """α with the least squared error of ``dequantize(quantize(x))``, over the histogram."""

    def propose(self, level_set: LevelSet) -> torch.Tensor:
        counts, largest = self._magnitudes(level_set), super().propose(level_set)
        edges = _edges(counts.device)
        centres = ((edges[:-1] + edges[1:]) / 2).float()
        used = counts.sum(0) > 0
        values = centres[used].expand(len(counts), -1)
        alpha = _least_squares(values, largest.reshape(-1), level_set, counts[:, used])
        return alpha.reshape(self.low.shape)


def _squared_errors(
    rows: torch.Tensor,
    alphas: torch.Tensor,
    level_set: LevelSet,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ (weight ·) (Q(x) − x)² of every row (R, K) for every α (C, R) of it; float64, (C, R)."""
    if weights is None and level_set.unit <= reference.TABLE_UNIT:
        return _table_errors(rows, alphas, level_set)
    errors = []
    for alpha in alphas:
        lost = torch.ops.apot_fx.fake_quantize(rows, alpha, level_set.spec, 0) - rows
        squares = lost.double().square()
        errors.append((squares if weights is None else squares * weights).sum(1))
    return torch.stack(errors)


def _table_errors(rows: torch.Tensor, alphas: torch.Tensor, level_set: LevelSet) -> torch.Tensor:
    """The same by table, in parts that stay in the cache and in memory that is used again."""
    low, high = 2 * level_set.q_min, 2 * level_set.q_max
    table = reference.half_unit_levels(level_set.spec, rows.device, rows.dtype)
    scales = reference.per_alpha(2 * level_set.unit, alphas).unsqueeze(2)
    steps = reference.step_of(alphas, level_set.unit).unsqueeze(2)
    errors = torch.zeros(alphas.shape, dtype=torch.float64, device=rows.device)
    columns = max(1, min(rows.shape[1], _CHUNK // max(1, len(rows))))
    count = max(1, _CHUNK // max(1, len(rows) * columns))
    size = min(count, len(alphas)) * len(rows) * columns
    half, found = (torch.empty(size, dtype=rows.dtype, device=rows.device) for _ in range(2))
    place = torch.empty(size, dtype=torch.int32, device=rows.device)
    for scale, step, total in zip(*(x.split(count) for x in (scales, steps, errors)), strict=True):
        for part in rows.split(columns, 1):
            shape = torch.Size((len(scale), *part.shape))
            used = slice(shape.numel())
            t = torch.mul(part, scale, out=half[used].view(shape))
            t.ceil_().clamp_(low, high).sub_(low)
            places = place[used].copy_(t.view(-1))
            values = torch.index_select(table, 0, places, out=found[used]).view(shape)
            total += values.mul_(step).sub_(part).square_().sum(2, dtype=torch.float64)
    return errors


#: Values that the coarse search looks at: of every row at least 256, of few rows more.
_COARSE_ROW, _COARSE = 2**8, 2**15


def _least_squares(
    rows: torch.Tensor,
    largest: torch.Tensor,
    level_set: LevelSet,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The α of every row with the least (weighted) squared error.

    First 21 ratios of ``largest``, on a sample of long rows, then 9 ratios around the best.
    """
    sample = rows
    stride = rows.shape[1] // max(_COARSE_ROW, _COARSE // max(1, len(rows)))
    if weights is None and stride > 1:
        sample = rows[:, ::stride].contiguous()

    def best_of(values: torch.Tensor, ratios: list[torch.Tensor]) -> torch.Tensor:
        alphas = (largest * torch.stack(ratios)).clamp(ALPHA_MIN, ALPHA_MAX)
        return _squared_errors(values, alphas, level_set, weights).argmin(0)

    coarse = [1.0, 1.1, 1.05, *(0.95 - 0.05 * place for place in range(18))]
    place = best_of(sample, [torch.full_like(largest, ratio) for ratio in coarse])
    centre = torch.tensor(coarse, device=largest.device)[place]
    fine = [0.0, *(0.01 * step for step in (-4, -3, -2, -1, 1, 2, 3, 4))]
    place = best_of(rows, [centre + shift for shift in fine])
    ratio = centre + torch.tensor(fine, device=largest.device)[place]
    return (largest * ratio).clamp(ALPHA_MIN, ALPHA_MAX)


#: Elements that the search for α works on at a time: its passes stay in the cache.
_CHUNK = 2**17


@torch.no_grad()
def weight_alpha(
    weight: torch.Tensor,
    level_set: LevelSet,
    observer: str,
    axis: int | None,
    group_size: int | None,
    name: str = "weight",
) -> torch.Tensor:
    """α of a weight, found from the weight itself: ``"minmax"`` or ``"mse"``.

    float32, ``()``, ``(C,)`` or ``(C, groups)``. Raises TensorError naming ``name`` for NaN or inf.
    """
    if weight.numel() and not bool(torch.stack(weight.aminmax()).isfinite().all()):
        raise TensorError(f"{name} holds NaN or inf; repair or reload it before quantizing")
    rows = rows_of(weight, axis, group_size)  # widened in parts: a bf16 weight would take thrice
    if not rows.shape[1]:
        rows = rows.new_zeros(len(rows), 1)
    largest = covering_alpha(rows.amin(1).float(), rows.amax(1).float(), _limits(level_set.spec))
    if observer == "mse":
        count = max(1, _CHUNK // rows.shape[1])
        parts = zip(rows.split(count), largest.split(count), strict=True)
        found = [_least_squares(part.float().contiguous(), ends, level_set) for part, ends in parts]
        largest = torch.cat(found) if found else largest
    if axis is None:
        return largest.reshape(())
    channels = weight.shape[axis]
    return largest if group_size is None else largest.reshape(channels, -1)


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
}


def make_observer(
    name: str, shape: tuple[int, ...], axis: int | None, group_size: int | None
) -> Observer:
    """An observer by name; raises ConfigError (did you mean …)."""
    check_choice("observer", name, ACTIVATION_OBSERVERS)
    return OBSERVERS[name](shape, axis, group_size)
