"""``LinearAPoT``: a weight as APoT codes, multiplied by shifts and adds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import CompatError, TensorError
from ..kernels import readable
from ..levels import LevelSet
from . import _tables
from ._checks import QPARAMS, checked
from ._module import CompatModule
from .observer import APoTObserver
from .quantizer import quantize_APoT


class LinearAPoT(CompatModule):
    """``y = x · codesᵀ``, as the original, and :meth:`forward_levels`, the product that was meant.

    Args:
        weight2quantize: float, (out, in).
        b, k: bits of a code and of a term; k divides b.
        signed: whether levels are signed. Without, as in the original, negative weights become 0.

    Attributes:
        weight: the codes, int32, (out, in). ``weight_transposed`` is its transpose.
        alpha, gamma, quantization_levels, level_indices: of the weight's observer.
        levels: the integer level of every weight, float32, (out, in).

    Raises CompatError (an AssertionError) for a weight that is not 2-d or impossible b and k,
    TensorError for one that is no float tensor, NaN or inf.

    >>> layer = LinearAPoT(torch.tensor([[0.0, 0.5, 1.0]]), b=4, k=2)
    >>> layer.weight.tolist(), layer.levels.tolist()
    ([[0, 9, 5]], [[0.0, 24.0, 48.0]])
    >>> x = torch.tensor([[7.0, 1.0, 2.0]])
    >>> layer(x).tolist(), layer.forward_levels(x).tolist()
    ([[19.0]], [[120.0]])
    """

    weight: Tensor
    quantization_levels: Tensor
    level_indices: Tensor
    alpha: Tensor
    gamma: Tensor
    signs: Tensor

    def __init__(self, weight2quantize: Tensor, b: int, k: int, signed: bool = False) -> None:
        super().__init__()
        weight2quantize = checked(weight2quantize, "LinearAPoT: weight2quantize", "floating-point")
        if weight2quantize.dim() != 2:
            raise CompatError(
                f"LinearAPoT: weight2quantize has shape {tuple(weight2quantize.shape)}; "
                "(out, in) is wanted"
            )
        self.level_set = _tables.torch_set(b, k, signed)
        self.b, self.k, self.n = b, k, b // k
        if readable(weight2quantize) and not bool(weight2quantize.isfinite().all()):
            raise TensorError(
                "LinearAPoT: weight2quantize holds NaN or inf; repair or reload it first"
            )
        observer = APoTObserver(b=b, k=k).to(weight2quantize.device)
        observer(weight2quantize)
        qparams = observer.calculate_qparams(signed=signed)
        for name, value in zip(QPARAMS, qparams, strict=True):
            self.register_buffer(name, value)
        self.register_buffer("weight", quantize_APoT(weight2quantize, *qparams).data)
        self.shifts, signs = _powers_of_two(self.level_set)
        self.register_buffer("signs", signs.to(self.weight.device), persistent=False)

    @property
    def weight_transposed(self) -> Tensor:
        return self.weight.T

    @property
    def levels(self) -> Tensor:
        levels: Tensor = torch.ops.apot_fx.levels(self._index(), self.level_set.spec)
        return levels

    def _index(self) -> Tensor:
        """The index of every weight's code in the level set."""
        table = torch.tensor(self.level_set.code_indices, device=self.weight.device)
        return table[self.weight.long()].to(torch.int16)

    def decompose_APoT(self, x: str) -> list[str]:
        """Cut a code's binary digits (``"0b0110"``) into blocks of k, first to last.

        Written with b digits, the blocks are the code's terms.

        >>> LinearAPoT(torch.ones(1, 1), b=4, k=2).decompose_APoT("0b0110")
        ['01', '10']
        """
        digits = x[2:]
        return [digits[place : place + self.k] for place in range(0, len(digits), self.k)]

    def bitshift_mul(self, weight_val: Sequence[str], r: int) -> int:
        """r times the code whose blocks are ``weight_val``: r shifted and added per digit 1.

        >>> LinearAPoT(torch.ones(1, 1), b=4, k=2).bitshift_mul(["01", "10"], 7)
        42
        """
        digits = reversed("".join(weight_val))
        return sum(int(r) << place for place, digit in enumerate(digits) if digit == "1")

    def matmul(self, decomposed_weight: Any, activation: Tensor) -> Tensor:
        """``activation @ codes`` by shifts and adds.

        Args:
            decomposed_weight: (in, out): for every code its blocks, nested sequences or an object
                array as the original makes them, or the codes themselves, an integer tensor.
            activation: (batch, in), integer values of any real dtype.

        Returns float32, (batch, out), and raises as :meth:`forward`.

        >>> layer = LinearAPoT(torch.ones(1, 1), b=4, k=2)
        >>> layer.matmul([[["01", "10"]], [["01"]]], torch.tensor([[7.0, 5.0]])).tolist()
        [[47.0]]
        """
        activation = checked(activation, "LinearAPoT: activation")
        largest = len(self.level_set.code_indices) - 1
        if not isinstance(decomposed_weight, Tensor):
            rows = [[int("0" + "".join(v), 2) for v in row] for row in decomposed_weight]
            decomposed_weight = torch.tensor(rows, dtype=torch.int64)
            largest = max(map(max, rows))
        codes = decomposed_weight.to(activation.device).long()
        places = range(max(1, largest.bit_length()))
        return _shift_add(activation, ((place, codes >> place & 1) for place in places))

    def forward(self, activation: Tensor) -> Tensor:
        """``F.linear(activation, codes)`` by shifts and adds: the original's product.

        For k > 1 a code is not its level; :meth:`forward_levels` multiplies levels.

        Args:
            activation: (batch, in), integer values of any real dtype.

        Returns float32, (batch, out): exact and rounded once where Σ \\|activation\\| is below 2^53
        and Σ \\|activation · code\\| below 2^60; beyond, a float64 sum.

        Raises CompatError for another number of dimensions or features, TensorError for values that
        are not integers. While it is compiled values can't be looked at, and what is no integer is
        cut off unseen.
        """
        return self.matmul(self.weight_transposed, self._checked(activation))

    def forward_levels(self, activation: Tensor) -> Tensor:
        """``F.linear(activation, levels)`` by shifts of the levels' exponents.

        Args, result and errors as for :meth:`forward`, with levels in the place of codes. Times
        α / M it is the layer's real output.
        """
        activation, codes = self._checked(activation), self.weight_transposed.long()
        planes = (
            (shift, signs[codes]) for shift, signs in zip(self.shifts, self.signs, strict=True)
        )
        return _shift_add(activation, planes)

    def _checked(self, activation: Tensor) -> Tensor:
        activation = checked(activation, "LinearAPoT: activation")
        if activation.dim() != 2 or activation.shape[1] != self.weight.shape[1]:
            raise CompatError(
                f"LinearAPoT: activation has shape {tuple(activation.shape)}; "
                f"(batch, {self.weight.shape[1]}) is wanted"
            )
        return activation

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"in_features={in_features}, out_features={out_features}, {self.level_set}"


def _powers_of_two(level_set: LevelSet) -> tuple[tuple[int, ...], Tensor]:
    """The exponents of the levels' powers of two, and the sign that each has in every code's level:
    0, 1 or −1, int8, (exponents, codes)."""
    terms = [level_set.terms(index) for index in level_set.code_indices]
    shifts = sorted({shift for pairs in terms for _, shift in pairs})
    signs = [
        [sum(sign for sign, at in pairs if at == shift) for pairs in terms] for shift in shifts
    ]
    return tuple(shifts), torch.tensor(signs, dtype=torch.int8)


def _shift_add(activation: Tensor, planes: Iterable[tuple[int, Tensor]]) -> Tensor:
    """``Σ (activation @ plane) << shift``, float32; planes (in, out) hold 0, 1 and −1.

    A product with such a plane only adds, exactly; float64, because not every device has an integer
    one. What might wrap around as an integer is summed as float64, too. Raises TensorError for
    values that are not integers.
    """
    if readable(activation) and not _holds_integers(activation):
        raise TensorError(
            "LinearAPoT: activation holds values that are no integers; quantize it uniformly"
        )
    rows = activation.double()
    exact = rows.new_zeros((), dtype=torch.int64)
    wide, reach = rows.new_zeros(()), rows.new_zeros(())
    for shift, plane in planes:
        part = rows @ plane.double()
        exact = exact + (part.long() << shift)
        wide = wide + part * 2.0**shift
        reach = reach + part.abs() * 2.0**shift
    return torch.where(reach < 2.0**62, exact.float(), wide.float())


def _holds_integers(x: Tensor) -> bool:
    return bool(x.isfinite().all()) and torch.equal(x, x.trunc())
