"""AdaRound's maths: how far a weight goes from the level below to the level above.

Source: Nagel et al., *Up or Down? Adaptive Rounding for Post-Training Quantization*, ICML 2020,
equations 23 and 24.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Ends of the stretched sigmoid; clamped to [0, 1] it reaches both.
ZETA, GAMMA = 1.1, -0.1


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h = clamp(sigmoid(v) · (ζ − γ) + γ, 0, 1)``: 0 is the level below, 1 the level above.

    >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return torch.clamp(torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA, 0, 1)


def initial_logits(fraction: Tensor) -> Tensor:
    """The v whose :func:`rectified_sigmoid` is ``fraction``, each in [0, 1].

    >>> rectified_sigmoid(initial_logits(torch.tensor([0.25, 0.75]))).tolist()
    [0.25, 0.75]
    """
    return torch.logit((fraction - GAMMA) / (ZETA - GAMMA))


def regularizer(v: Tensor, beta: float) -> Tensor:
    """``Σ 1 − |2h − 1|^β``: an element adds 0 once it is decided, 1 half-way.

    >>> regularizer(torch.tensor([-9.0, 0.0, 9.0]), 2.0).item()
    1.0
    """
    return (1 - (2 * rectified_sigmoid(v) - 1).abs().pow(beta)).sum()


def annealed_beta(
    step: int, steps: int, warm_start: float = 0.2, start: float = 20.0, end: float = 2.0
) -> float:
    """β at ``step`` of ``steps``: ``start`` through the warm start, then a half cosine to ``end``.

    >>> [round(annealed_beta(step, 100), 1) for step in (0, 20, 60, 100)]
    [20.0, 20.0, 11.0, 2.0]
    """
    warm = warm_start * steps
    if step <= warm:
        return start
    return end + (start - end) * (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2
