"""Prepared layers: torch's own Linear and convolutions with a quantized weight.

In train they are ordinary fake-quant with gradients. In eval they compute the very integers that
the converted layer computes, on integer-valued floats (contract 4.10), so that both stages agree
bit for bit.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..config import WeightSpec
from ..fake_quant import EXACT_UNIT, FakeQuantize
from .fold import BATCH_NORMS, is_foldable, scale_and_bias
from .op import PreparedOp, with_gradient_of
from .products import EXACT_SUM, ConvProduct, LinearProduct, Product


class PreparedLayer(PreparedOp):
    """Mixin of the prepared layers; called as ``layer(x, fake_quant, batch_norm, weight, bias)``.

    ``fake_quant`` is the module that put ``x`` on its grid (None: weight-only), ``batch_norm`` the
    one that is folded into this call (None: no fold). ``weight`` and ``bias`` come along where they
    are computed (a functional call); else they are the module's own.
    """

    float_type: ClassVar[type[nn.Module]]
    #: Whether an input was seen whose channels batch norm does not normalise (3-d, for Linear).
    norm_apart: bool = False
    #: Where (``file.py:12``) other code reads its weight without calling it: then it stays float.
    read_at: str = ""
    weight_fake_quant: FakeQuantize
    weight_shape: torch.Size

    @classmethod
    def take_over(
        cls, layer: nn.Module, spec: WeightSpec, name: str, weight: torch.Tensor | None = None
    ) -> Any:
        """Turn a float layer into a prepared one: same Parameters, keys, hooks and mode.

        ``weight``: its value now, where it is computed. Raises TensorError naming
        ``<name>.weight`` where it holds NaN or inf.
        """
        value = layer.weight if weight is None else weight
        assert isinstance(value, torch.Tensor)
        fake_quant = FakeQuantize.for_weight(value, spec, f"{name}.weight")
        prepared = cls.__new__(cls)
        prepared.__dict__.update(layer.__dict__)
        prepared.weight_fake_quant = fake_quant.train(layer.training)
        prepared.weight_shape = value.shape
        return prepared

    @property
    def kind(self) -> str:
        """What the layer computes, for people."""
        return self.float_type.__name__

    @property
    def product(self) -> Product:
        raise NotImplementedError

    def weighted(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The float layer with another weight."""
        raise NotImplementedError

    @property
    def own_fake_quant(self) -> FakeQuantize | None:
        """Its input's, child ``activation_post_process``; only standalone layers have it."""
        return self._modules.get("activation_post_process")  # type: ignore[return-value]

    def in_float(self) -> nn.Module:
        """The float layer again, with the same Parameters."""
        layer = self.float_type.__new__(self.float_type)
        layer.__dict__.update(self.__dict__)
        ours = ("weight_fake_quant", "activation_post_process")
        layer._modules = {k: m for k, m in self._modules.items() if k not in ours}
        return layer

    def operands(
        self, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a call: those that it was given, or the module's own."""
        if weight is not None:
            return weight, bias
        own, offset = self.weight, self.bias
        assert isinstance(own, torch.Tensor) and not isinstance(offset, nn.Module)
        return own, offset

    def forward(
        self,
        x: torch.Tensor,
        fake_quant: FakeQuantize | None = None,
        batch_norm: nn.Module | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        w, b = self.operands(weight, bias)
        if self.read_at:
            return self.weighted(x, w, b)
        own = self.own_fake_quant
        if own is not None:
            x, fake_quant = own(x), own
        if batch_norm is not None and not self.product.channels_meet_batch_norm(x):
            self.norm_apart = True
        if self.training or not self._is_exact(fake_quant):
            return self._train_form(x, batch_norm, w, b)
        folded = batch_norm if self._folds(x, batch_norm) else None
        y = self._integer_form(x, fake_quant, folded, w, b).to(w.dtype)
        if batch_norm is not None and folded is None:
            y = batch_norm(y)
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
            return with_gradient_of(y, self._train_form(x, batch_norm, w, b))
        return y

    def _folds(self, x: torch.Tensor, batch_norm: nn.Module | None) -> bool:
        return (
            batch_norm is not None
            and not batch_norm.training
            and self.product.channels_meet_batch_norm(x)
        )

    def _is_exact(self, fake_quant: FakeQuantize | None) -> bool:
        return _on_grid(self.weight_fake_quant) and (fake_quant is None or _on_grid(fake_quant))

    def _train_form(
        self,
        x: torch.Tensor,
        batch_norm: nn.Module | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        quantized = self.weight_fake_quant(weight).to(weight.dtype)
        y = self.weighted(x.to(quantized.dtype), quantized, bias)
        return y if batch_norm is None else batch_norm(y)

    def _integer_form(
        self,
        x: torch.Tensor,
        fake_quant: FakeQuantize | None,
        batch_norm: nn.Module | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        with torch.no_grad():
            size, quant = self.weight_fake_quant.group_size, self.weight_fake_quant
            levels = torch.ops.apot_fx.levels(self.integer_weight(weight), quant.level_spec)
            s, b = self._scale_and_bias(fake_quant, batch_norm, len(weight), bias)
            if fake_quant is None:
                return self.product.weight_only(x, levels, s, b, size or levels[0].numel())
            alpha = fake_quant.clamped_alpha()
            x = torch.ops.apot_fx.to_levels(x, alpha, fake_quant.level_spec)
            # By the weight-free bound: a look at the weights would be a data-dependent branch.
            wide = levels[0].numel() * fake_quant.unit * quant.unit > EXACT_SUM
            return self.product(x, levels, s, b, size, wide)

    def _scale_and_bias(
        self,
        fake_quant: FakeQuantize | None,
        batch_norm: nn.Module | None,
        channels: int,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        step = None if fake_quant is None else fake_quant.step()
        return scale_and_bias(step, self.weight_fake_quant.step(), channels, bias, batch_norm)

    @torch.no_grad()
    def distance_of_forms(
        self,
        x: torch.Tensor,
        fake_quant: FakeQuantize | None = None,
        batch_norm: nn.Module | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> float:
        """Largest |train form − integer form|, relative to the largest |y| or |acc · s|.

        In eval, of the same input. 0.0 where the layer is not in its integer form.
        """
        own = self.own_fake_quant
        if own is not None:
            x, fake_quant = own(x), own
        if (
            self.read_at
            or not self._is_exact(fake_quant)
            or (batch_norm and not self._folds(x, batch_norm))
        ):
            return 0.0
        operands = self.operands(weight, bias)
        y = self._integer_form(x, fake_quant, batch_norm, *operands)
        train = self._train_form(x, batch_norm, *operands)
        _, b = self._scale_and_bias(fake_quant, batch_norm, len(operands[0]), operands[1])
        product = y - b.reshape(-1, *[1] * (-1 - self.product.channel_axis))
        largest = torch.maximum(y.abs(), product.abs()).nan_to_num().max() if y.numel() else 0.0
        apart = (train.float() - y).abs().nan_to_num().max() if y.numel() else 0.0
        return float(apart / largest) if largest else 0.0

    @torch.no_grad()
    def integer_weight(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The weight's indices now (uint8 or int16, the weight's shape)."""
        quant = self.weight_fake_quant
        value, _ = self.operands(weight, None)
        return torch.ops.apot_fx.quantize(
            value.detach(), quant.clamped_alpha(), quant.level_spec, quant.axis, quant.group_size
        )


def _on_grid(fake_quant: FakeQuantize) -> bool:
    return fake_quant.quantizes and fake_quant.unit <= EXACT_UNIT


class PreparedLinear(PreparedLayer, nn.Linear):  # type: ignore[misc]
    float_type = nn.Linear

    @property
    def product(self) -> LinearProduct:
        return LinearProduct()

    def weighted(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return nn.functional.linear(x, weight, bias)


class PreparedConv1d(PreparedLayer, nn.Conv1d):  # type: ignore[misc]
    float_type = nn.Conv1d

    @property
    def product(self) -> ConvProduct:
        return ConvProduct.of(self)

    def weighted(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return self._conv_forward(x, weight, bias)


class PreparedConv2d(PreparedLayer, nn.Conv2d):  # type: ignore[misc]
    float_type = nn.Conv2d

    @property
    def product(self) -> ConvProduct:
        return ConvProduct.of(self)

    def weighted(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return self._conv_forward(x, weight, bias)


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

    def weighted(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return self.geometry.in_float(x, weight, bias)


#: Which prepared layer stands for which torch layer. Subclasses of these may compute something
#: else, so only exact types are taken.
PREPARED: dict[type[nn.Module], type[PreparedLayer]] = {
    kind.float_type: kind
    for kind in (PreparedLinear, PreparedConv1d, PreparedConv2d, PreparedFunctional)
}


def can_fold(layer: nn.Module, batch_norm: nn.Module, weight: torch.Tensor) -> str:
    """Why ``batch_norm`` can't be folded into ``layer``'s calls; ``""`` where it can."""
    geometry = layer.geometry if isinstance(layer, FunctionalLayer) else layer
    rank = len(getattr(geometry, "stride", (1,)))  # Linear has none and goes with BatchNorm1d
    if BATCH_NORMS[rank - 1] is not type(batch_norm) or (
        getattr(batch_norm, "num_features", None) != len(weight)
    ):
        return f"{type(batch_norm).__name__} normalises another axis than the layer's channels"
    if not is_foldable(batch_norm):
        return "batch norm has no running statistics"
    return ""
