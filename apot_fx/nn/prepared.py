"""Prepared layers: torch's own Linear and convolutions with a quantized weight.

In train they are ordinary fake-quant with gradients. In eval they compute the very integers that
the converted layer computes, on integer-valued floats (contract 4.10), so that both stages agree
bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ..config import WeightSpec
from ..fake_quant import EXACT_UNIT, FakeQuantize
from .fold import is_foldable, scale_and_bias
from .op import PreparedOp, with_gradient_of
from .products import EXACT_SUM, ConvProduct, LinearProduct, Product


class PreparedLayer(PreparedOp):
    """Mixin of the prepared layers; in the graph called as ``layer(x, fake_quant, batch_norm)``.

    ``fake_quant`` is the module that put ``x`` on its grid (None: weight-only), ``batch_norm`` the
    one that is folded into this call (None: no fold).
    """

    float_type: ClassVar[type[nn.Module]]
    #: Whether an input was seen whose channels batch norm does not normalise (3-d, for Linear).
    norm_apart: bool = False
    weight_fake_quant: FakeQuantize
    if TYPE_CHECKING:  # the torch layer beside this mixin brings them

        @property
        def weight(self) -> nn.Parameter: ...
        @property
        def bias(self) -> nn.Parameter | None: ...

    @classmethod
    def take_over(cls, layer: nn.Module, spec: WeightSpec, name: str) -> Any:
        """Turn a float layer into a prepared one: same Parameters, keys, hooks and mode.

        Raises TensorError naming ``<name>.weight`` where it holds NaN or inf.
        """
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        fake_quant = FakeQuantize.for_weight(weight, spec, f"{name}.weight")
        prepared = cls.__new__(cls)
        prepared.__dict__.update(layer.__dict__)
        prepared.weight_fake_quant = fake_quant.train(layer.training)
        return prepared

    @property
    def product(self) -> Product:
        raise NotImplementedError

    def weighted(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The float layer with another weight."""
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        fake_quant: FakeQuantize | None = None,
        batch_norm: nn.Module | None = None,
    ) -> torch.Tensor:
        if batch_norm is not None and not self.product.channels_meet_batch_norm(x):
            self.norm_apart = True
        if self.training or not self._is_exact(fake_quant):
            return self._train_form(x, batch_norm)
        folded = batch_norm if self._folds(x, batch_norm) else None
        y = self._integer_form(x, fake_quant, folded).to(self.weight.dtype)
        if batch_norm is not None and folded is None:
            y = batch_norm(y)
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return with_gradient_of(y, self._train_form(x, batch_norm))
        return y

    def _folds(self, x: torch.Tensor, batch_norm: nn.Module | None) -> bool:
        return (
            batch_norm is not None
            and not batch_norm.training
            and self.product.channels_meet_batch_norm(x)
        )

    def _is_exact(self, fake_quant: FakeQuantize | None) -> bool:
        return _on_grid(self.weight_fake_quant) and (fake_quant is None or _on_grid(fake_quant))

    def _train_form(self, x: torch.Tensor, batch_norm: nn.Module | None) -> torch.Tensor:
        weight = self.weight_fake_quant(self.weight).to(self.weight.dtype)
        y = self.weighted(x.to(weight.dtype), weight)
        return y if batch_norm is None else batch_norm(y)

    def _integer_form(
        self, x: torch.Tensor, fake_quant: FakeQuantize | None, batch_norm: nn.Module | None
    ) -> torch.Tensor:
        with torch.no_grad():
            size, weight = self.weight_fake_quant.group_size, self.weight_fake_quant
            levels = torch.ops.apot_fx.levels(self.integer_weight(), weight.level_spec)
            s, b = self._scale_and_bias(fake_quant, batch_norm)
            if fake_quant is None:
                return self.product.weight_only(x, levels, s, b, size or levels[0].numel())
            alpha = fake_quant.clamped_alpha()
            x = torch.ops.apot_fx.to_levels(x, alpha, fake_quant.level_spec)
            # By the weight-free bound: a look at the weights would be a data-dependent branch.
            wide = levels[0].numel() * fake_quant.unit * weight.unit > EXACT_SUM
            return self.product(x, levels, s, b, size, wide)

    def _scale_and_bias(
        self, fake_quant: FakeQuantize | None, batch_norm: nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = None if fake_quant is None else fake_quant.step()
        weight_step = self.weight_fake_quant.step()
        return scale_and_bias(step, weight_step, len(self.weight), self.bias, batch_norm)

    @torch.no_grad()
    def distance_of_forms(
        self,
        x: torch.Tensor,
        fake_quant: FakeQuantize | None = None,
        batch_norm: nn.Module | None = None,
    ) -> float:
        """Largest |train form − integer form|, relative to the largest |y| or |acc · s|.

        In eval, of the same input. 0.0 where the layer is not in its integer form.
        """
        if not self._is_exact(fake_quant) or (batch_norm and not self._folds(x, batch_norm)):
            return 0.0
        y = self._integer_form(x, fake_quant, batch_norm)
        train = self._train_form(x, batch_norm)
        _, b = self._scale_and_bias(fake_quant, batch_norm)
        product = y - b.reshape(-1, *[1] * (-1 - self.product.channel_axis))
        largest = torch.maximum(y.abs(), product.abs()).nan_to_num().max() if y.numel() else 0.0
        apart = (train.float() - y).abs().nan_to_num().max() if y.numel() else 0.0
        return float(apart / largest) if largest else 0.0

    @torch.no_grad()
    def integer_weight(self) -> torch.Tensor:
        """The weight's indices now (uint8 or int16, the weight's shape)."""
        quant = self.weight_fake_quant
        alpha, weight = quant.clamped_alpha(), self.weight.detach()
        return torch.ops.apot_fx.quantize(
            weight, alpha, quant.level_spec, quant.axis, quant.group_size
        )


def _on_grid(fake_quant: FakeQuantize) -> bool:
    return fake_quant.quantizes and fake_quant.unit <= EXACT_UNIT


class PreparedLinear(PreparedLayer, nn.Linear):  # type: ignore[misc]
    float_type = nn.Linear

    @property
    def product(self) -> LinearProduct:
        return LinearProduct()

    def weighted(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, weight, self.bias)


class PreparedConv1d(PreparedLayer, nn.Conv1d):  # type: ignore[misc]
    float_type = nn.Conv1d

    @property
    def product(self) -> ConvProduct:
        return ConvProduct.of(self)

    def weighted(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, weight, self.bias)


class PreparedConv2d(PreparedLayer, nn.Conv2d):  # type: ignore[misc]
    float_type = nn.Conv2d

    @property
    def product(self) -> ConvProduct:
        return ConvProduct.of(self)

    def weighted(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, weight, self.bias)


#: Which prepared layer stands for which torch layer. Subclasses of these may compute something
#: else, so only exact types are taken.
PREPARED: dict[type[nn.Module], type[PreparedLayer]] = {
    kind.float_type: kind for kind in (PreparedLinear, PreparedConv1d, PreparedConv2d)
}


def can_fold(layer: nn.Module, batch_norm: nn.Module) -> str:
    """Why ``batch_norm`` can't be folded into ``layer``'s calls; ``""`` where it can."""
    wanted = {nn.Linear: nn.BatchNorm1d, nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d}
    float_type = layer.float_type if isinstance(layer, PreparedLayer) else type(layer)
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if wanted.get(float_type) is not type(batch_norm) or (
        getattr(batch_norm, "num_features", None) != len(weight)
    ):
        return f"{type(batch_norm).__name__} normalises another axis than the layer's channels"
    if not is_foldable(batch_norm):
        return "batch norm has no running statistics"
    return ""
