"""Several forward passes on the same weights."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..fake_quant import keeping_weights


def accumulating() -> AbstractContextManager[None]:
    """A context in which weights are quantized once, not at every forward pass.

    For steps that sum the gradients of several batches: weights stay as they are in between, and
    so do the bits of every result and gradient. A weight or α that was written in place (by an
    optimizer's step, say) is quantized anew; writes through ``.data`` go unseen, so keep these
    outside. The quantized weights of all layers stay in memory until the context ends. Compiled
    code, and weights that are computed (by a parametrization), quantize at every pass.

    >>> import torch, apot_fx
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> model = apot_fx.prepare_apot(model, "w4a4")
    >>> optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    >>> with accumulating():
    ...     for batch in torch.randn(4, 8, 4):
    ...         model(batch).square().mean().backward()
    >>> optimizer.step()
    """
    return keeping_weights()
