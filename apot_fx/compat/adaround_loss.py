"""``AdaptiveRoundingLoss``: reconstruction, and the push of every rounding towards 0 or 1."""

from __future__ import annotations

from torch import Tensor, nn

from ..errors import CompatError
from ..ptq.rounding import annealed_beta, regularizer


class AdaptiveRoundingLoss(nn.Module):
    """Both terms of AdaRound's loss at an iteration.

    Args:
        max_iter: iterations in all.
        warm_start: the share of them without regularization.
        beta_range: β after the warm start and at the end.
        reg_param: weight of the regularization.

    >>> import torch
    >>> loss = AdaptiveRoundingLoss(max_iter=100)
    >>> out, wanted, V = torch.zeros(4), torch.ones(4), torch.zeros(10)
    >>> [round(term.item(), 4) for term in loss(out, wanted, V, curr_iter=10)]
    [0.0, 1.0]
    >>> [round(term.item(), 4) for term in loss(out, wanted, V, curr_iter=60)]
    [0.01, 1.0]
    """

    def __init__(
        self,
        max_iter: int,
        warm_start: float = 0.2,
        beta_range: tuple[float, float] = (20, 2),
        reg_param: float = 0.001,
    ) -> None:
        super().__init__()
        self.max_iter, self.warm_start = max_iter, warm_start
        self.beta_range, self.reg_param = beta_range, reg_param

    def rounding_regularization(self, V: Tensor, curr_iter: int) -> Tensor:
        """``reg_param · Σ (1 − |2h(V) − 1|^β)``, 0 while warm; 0-dim.

        Raises CompatError (an AssertionError) unless ``curr_iter`` is below ``max_iter``.
        """
        if not curr_iter < self.max_iter:
            raise CompatError(
                f"AdaptiveRoundingLoss: iteration {curr_iter}, but max_iter is {self.max_iter}"
            )
        if curr_iter < self.warm_start * self.max_iter:
            return V.new_zeros(())
        start, end = self.beta_range
        beta = annealed_beta(curr_iter, self.max_iter, self.warm_start, start, end)
        return self.reg_param * regularizer(V, beta)

    def reconstruction_loss(self, soft_quantized_output: Tensor, original_output: Tensor) -> Tensor:
        """Mean squared difference; 0-dim."""
        return nn.functional.mse_loss(soft_quantized_output, original_output)

    def forward(
        self, soft_quantized_output: Tensor, original_output: Tensor, V: Tensor, curr_iter: int
    ) -> tuple[Tensor, Tensor]:
        """Regularization and reconstruction, in this order; their sum is what to minimize."""
        return (
            self.rounding_regularization(V, curr_iter),
            self.reconstruction_loss(soft_quantized_output, original_output),
        )
