"""``PreparedLayer``: a linear layer or a convolution with a quantized weight.

In train it is ordinary fake-quant with gradients. In eval it computes the very integers that the
converted layer computes, on integer-valued floats (contract 4.10), so that both stages agree bit
for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ..fake_quant import EXACT_UNIT, FakeQuantize
from .fold import scale_and_bias
from .op import with_gradient_of
from .products import EXACT_SUM, Product
from .weighted import PreparedWeighted


class Call(NamedTuple):
    """What one call computes with beside its input."""

    product: Product
    fake_quant: FakeQuantize | None
    batch_norm: nn.Module | None
    weight: torch.Tensor
    bias: torch.Tensor | None


class PreparedLayer(PreparedWeighted):
    """Mixin of the layers that multiply and add; see :meth:`forward`."""

    #: Whether an input was seen whose channels batch norm does not normalise (3-d, for Linear).
    norm_apart: bool = False

    @property
    def product(self) -> Product:
        raise NotImplementedError

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        return self.product.rows(weight)

    def weighted(
        self, product: Product, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The float layer with another weight, in the float layer's bits."""
        return product.in_float(x, weight, bias)

    @property
    def own_fake_quant(self) -> FakeQuantize | None:
        """Its input's, child ``activation_post_process``; only standalone layers have it."""
        return self._modules.get("activation_post_process")  # type: ignore[return-value]

    def forward(
        self,
        input: torch.Tensor,
        fake_quant: FakeQuantize | None = None,
        batch_norm: nn.Module | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """In a graph: the call of a layer.

        Args:
            input: its input.
            fake_quant: the module that put ``input`` on its grid; None: weight-only.
            batch_norm: the one that is folded into this call; None: no fold.
            weight, bias: where they are computed (a functional call); else they are the module's.
        """
        operands = self.operands(weight, bias)
        return self.run(input, Call(self.product, fake_quant, batch_norm, *operands))

    def run(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        """The result of a call."""
        if self.read_at:
            return self.weighted(call.product, x, call.weight, call.bias)
        x, call = self._on_own_grid(x, call)
        norm = call.batch_norm
        if norm is not None and not call.product.channels_meet_batch_norm(x):
            self.norm_apart = True
        if self.training or not self._is_exact(call):
            return self._train_form(x, call)
        folds = _folds(x, call)
        exact = call if folds else call._replace(batch_norm=None)
        y = self._integer_form(x, exact).to(call.weight.dtype)
        if norm is not None and not folds:
            y = norm(y)
        if torch.is_grad_enabled() and (x.requires_grad or call.weight.requires_grad):
            return with_gradient_of(y, self._train_form(x, call))
        return y

    def _on_own_grid(self, x: torch.Tensor, call: Call) -> tuple[torch.Tensor, Call]:
        own = self.own_fake_quant
        return (x, call) if own is None else (own(x), call._replace(fake_quant=own))

    def _is_exact(self, call: Call) -> bool:
        quant = call.fake_quant
        return _on_grid(self.weight_fake_quant) and (quant is None or _on_grid(quant))

    def _train_form(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        rows = call.product.rows(call.weight)
        quantized = self.weight_fake_quant(rows)
        weight = call.weight
        if quantized is not rows:  # else the weight itself: torch's bits depend on its strides
            weight = call.product.stored(quantized).to(weight.dtype)
        y = self.weighted(call.product, x.to(weight.dtype), weight, call.bias)
        return y if call.batch_norm is None else call.batch_norm(y)

    def _integer_form(self, x: torch.Tensor, call: Call) -> torch.Tensor:
        with torch.no_grad():
            size, quant, grid = (
                self.weight_fake_quant.group_size,
                self.weight_fake_quant,
                call.fake_quant,
            )
            levels = torch.ops.apot_fx.levels(self.integer_weight(call.weight), quant.level_spec)
            s, b = self._scale_and_bias(call)
            if grid is None:
                return call.product.weight_only(x, levels, s, b, size or levels.shape[1:].numel())
            x = torch.ops.apot_fx.to_levels(x, grid.clamped_alpha(), grid.level_spec)
            # By the weight-free bound: a look at the weights would be a data-dependent branch.
            wide = levels.shape[1:].numel() * grid.unit * quant.unit > EXACT_SUM
            return call.product(x, levels, s, b, size, wide)

    def _scale_and_bias(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        step = None if call.fake_quant is None else call.fake_quant.step()
        weight_step = self.weight_fake_quant.step()
        return scale_and_bias(step, weight_step, self.channels, call.bias, call.batch_norm)

    @torch.no_grad()
    def distance_of_forms(
        self,
        input: torch.Tensor,
        fake_quant: FakeQuantize | None = None,
        batch_norm: nn.Module | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> float:
        """How far the two forms of a call, as :meth:`forward` takes it, lie apart."""
        operands = self.operands(weight, bias)
        return self.distance(input, Call(self.product, fake_quant, batch_norm, *operands))

    def distance(self, x: torch.Tensor, call: Call) -> float:
        """Largest |train form − integer form|, relative to the largest |y| or |acc · s|.

        In eval, of the same input. 0.0 where the layer is not in its integer form.
        """
        x, call = self._on_own_grid(x, call)
        apart = call.batch_norm is not None and not _folds(x, call)
        if self.read_at or not self._is_exact(call) or apart:
            return 0.0
        y, train = self._integer_form(x, call), self._train_form(x, call)
        _, b = self._scale_and_bias(call)
        product = y - b.reshape(-1, *[1] * (-1 - call.product.channel_axis))
        largest = torch.maximum(y.abs(), product.abs()).nan_to_num().max() if y.numel() else 0.0
        distance = (train.float() - y).abs().nan_to_num().max() if y.numel() else 0.0
        return float(distance / largest) if largest else 0.0


def _folds(x: torch.Tensor, call: Call) -> bool:
    norm = call.batch_norm
    return norm is not None and not norm.training and call.product.channels_meet_batch_norm(x)


def _on_grid(fake_quant: FakeQuantize) -> bool:
    return fake_quant.quantizes and fake_quant.unit <= EXACT_UNIT


class FunctionalLayer(nn.Module):
    """A call of ``F.linear`` or ``F.conv…`` on a weight that hangs on parameters alone, in float.

    Called as ``layer(x, None, batch_norm, weight, bias)``, as prepared layers are. It takes the
    place of the module that owns the weight, where that has no other use.
    """

    geometry: Product
    stands_for: tuple[Any, ...]  # what a config may call it: its owner's class, function, layer

    def forward(
        self,
        x: torch.Tensor,
        fake_quant: None,
        batch_norm: None,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.geometry.in_float(x, weight, bias)

    def extra_repr(self) -> str:
        return str(self.geometry)


class PreparedFunctional(PreparedLayer):
    """The same with a quantized weight."""

    float_type = FunctionalLayer
    geometry: Product

    @property
    def product(self) -> Product:
        return self.geometry

    @property
    def kind(self) -> str:
        return self.geometry.name
