"""Products of two activations on levels: exact sums of integers, then one multiplication.

Both operands lie on grids of their own: ``y = fl(fl(Σ q_a · q_b) · s) + 0.0`` with
``s = fl(step_a · step_b)`` (contract 4.6, 4.10).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import TensorError
from ..fake_quant import FakeQuantize
from ..tensor import keep_float32
from .op import ConvertedOp, PreparedOp, with_gradient_of
from .products import EXACT_SUM

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """What is multiplied with what.

    ``call`` is torch's function: ``"matmul"``, ``"mm"``, ``"bmm"``, ``"baddbmm"`` with its factors
    ``alpha`` and ``beta``, or ``"einsum"`` with its ``equation``, output spelled out.
    """

    call: str
    equation: str = ""
    alpha: float = 1
    beta: float = 0

    def plain(self, a: torch.Tensor, b: torch.Tensor, addend: Any = None) -> torch.Tensor:
        """What torch computes; ``addend`` is what baddbmm adds to, if anything."""
        result: torch.Tensor
        if self.call == "einsum":
            result = torch.einsum(self.equation, a, b)
        elif self.call == "baddbmm":
            start = a.new_zeros(1, 1, 1) if addend is None else addend.to(a.dtype)
            result = torch.baddbmm(start, a, b, beta=self.beta, alpha=self.alpha)
        else:
            result = getattr(torch, self.call)(a, b)
        return result

    def exact(
        self, a: torch.Tensor, b: torch.Tensor, s: torch.Tensor, unit: int, addend: Any = None
    ) -> torch.Tensor:
        """Levels in (integer-valued float32), ``y = fl(fl(acc) · s) + 0.0`` out.

        Of baddbmm ``fl(y · alpha) + fl(addend · beta)``. ``unit``: the largest magnitude of a
        product of two levels.
        """
        wide = self.terms(a, b) * unit > EXACT_SUM
        out: torch.Tensor
        if self.call == "einsum":
            out = torch.ops.apot_fx.einsum(a, b, s, self.equation, wide)
        else:
            out = torch.ops.apot_fx.matmul(a, b, s, wide)
        out = out if self.alpha == 1 else out * self.alpha
        if addend is not None:
            out = out + (addend if self.beta == 1 else addend * self.beta)
        return out

    def terms(self, a: torch.Tensor, b: torch.Tensor) -> int:
        """How many products every sum has."""
        if self.call != "einsum":
            return a.shape[-1]
        inputs, output = self.equation.split("->")
        sizes: dict[str, int] = {}
        for labels, operand in zip(inputs.split(","), (a, b), strict=True):
            for label, size in zip(labels, operand.shape, strict=True):
                sizes[label] = max(size, sizes.get(label, 1)) if size else 0
        return math.prod([size for label, size in sizes.items() if label not in output])


def multiply(
    contraction: Contraction,
    pair: Pair,
    quants: tuple[FakeQuantize | None, ...],
    exact: bool,
    addend: torch.Tensor | None = None,
) -> torch.Tensor:
    """A product of values that fake-quants put on their grids.

    On levels where ``exact`` and both quantize, with the gradient of torch's own product; else
    that product, of the common dtype.
    """
    first, second = quants
    on_grid = first is not None and second is not None and first.quantizes and second.quantizes
    if not exact or not on_grid:
        return contraction.plain(*_alike(*pair), addend)
    assert first is not None and second is not None
    with torch.no_grad():
        a, b = (
            torch.ops.apot_fx.to_levels(x, quant.clamped_alpha(), quant.level_spec)
            for x, quant in zip(pair, (first, second), strict=True)
        )
        s = first.step() * second.step()
        y = contraction.exact(a, b, s, first.unit * second.unit, addend)
    learns = any(x is not None and x.requires_grad for x in (*pair, addend))
    if torch.is_grad_enabled() and learns:
        return with_gradient_of(y, contraction.plain(*_alike(*pair), addend).to(y.dtype))
    return y


def _alike(a: torch.Tensor, b: torch.Tensor) -> Pair:
    """Of one dtype: in eval a fake-quant gives float32, where the other operand may be float16."""
    if a.dtype == b.dtype:
        return a, b
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


class PreparedPairOp(PreparedOp):
    """An operator that multiplies activations.

    Buffer ``like``: empty, not persistent; it follows the model's dtype, to which results that
    were computed on levels are rounded.
    """

    like: torch.Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def rounded(self, y: torch.Tensor, quants: tuple[FakeQuantize | None, ...]) -> torch.Tensor:
        """A result in the dtype that the float model has there."""
        on_grid = any(quant is not None and quant.quantizes for quant in quants)
        return y.to(self.like.dtype) if on_grid and not self.training else y


class PreparedProduct(PreparedPairOp):
    """Torch's product in train; in eval the sum of products of levels.

    Called as ``op((a, b), (fake-quant of each), addend=…)``.
    """

    kind = "product"

    def __init__(self, contraction: Contraction, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype)
        self.contraction = contraction

    def forward(
        self,
        x: Pair,
        fake_quants: tuple[FakeQuantize | None, FakeQuantize | None] = (None, None),
        addend: torch.Tensor | None = None,
    ) -> torch.Tensor:
        y = multiply(self.contraction, x, fake_quants, not self.training, addend)
        return self.rounded(y, fake_quants)

    def extra_repr(self) -> str:
        return str(self.contraction)


class ConvertedPairOp(ConvertedOp):
    """The same on indices. Buffer ``s``: float32, one scale for every product it computes."""

    s: torch.Tensor

    def __init__(self, op: PreparedPairOp, quants: tuple[FakeQuantize, ...], s: Any) -> None:
        super().__init__()
        self.input_levels = tuple(quant.known_level_set() for quant in quants)
        self.input_spec = tuple(level_set.spec for level_set in self.input_levels)
        self.output_dtype = op.like.dtype
        self.register_buffer("s", s.detach().clone())

    def levels(self, x: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Indices in, integer-valued float32 out."""
        return [
            torch.ops.apot_fx.levels(index, spec)
            for index, spec in zip(x, self.input_spec, strict=True)
        ]

    def check_state(self, state: Mapping[str, Any]) -> None:
        if "s" in state and not (torch.isfinite(state["s"]).all() and (state["s"] > 0).all()):
            raise TensorError("s: holds NaN, inf or no positive scale; the file is damaged")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_float32(fn), recurse)


class ConvertedProduct(ConvertedPairOp):
    """The product of two index tensors; ``s`` is a scalar."""

    kind = "product"

    def __init__(
        self, op: PreparedProduct, fake_quants: tuple[FakeQuantize, FakeQuantize], batch_norm: None
    ) -> None:
        first, second = fake_quants
        super().__init__(op, fake_quants, first.step() * second.step())
        self.contraction = op.contraction

    def compute(self, x: Pair, addend: torch.Tensor | None = None) -> torch.Tensor:
        first, second = self.input_levels
        a, b = self.levels(x)
        y = self.contraction.exact(a, b, self.s, first.unit * second.unit, addend)
        return y.to(self.output_dtype)

    def extra_repr(self) -> str:
        first, second = self.input_levels
        return f"{self.contraction}, {first} x {second}"
