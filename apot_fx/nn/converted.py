"""Converted layers: packed integer weights, indices in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import TensorError
from ..fake_quant import FakeQuantize
from .convolution import TransposedProduct
from .fold import scale_and_bias
from .prepared import PreparedLayer
from .products import EXACT_SUM, Product, largest_sum
from .quantize import Quantize
from .weighted import ConvertedWeighted


class ConvertedLayer(ConvertedWeighted):
    """A Linear or convolution on packed weights; called as ``layer(x, *readers)``.

    ``x`` is a tensor of indices, or float where the layer is weight-only. Child ``weight`` is the
    :class:`ApotTensor`, output channels first; buffers ``s`` (``(C,)`` or ``(C, groups)``) and
    ``b`` (``(C,)``), float32, hold the scale and bias with batch norm folded in.
    """

    s: torch.Tensor
    b: torch.Tensor

    def __init__(
        self,
        layer: PreparedLayer,
        fake_quant: FakeQuantize | None,
        batch_norm: nn.Module | None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> None:
        weight, bias = layer.operands(weight, bias)
        super().__init__(layer, weight)
        self.product: Product = layer.product
        self.input_levels = None if fake_quant is None else fake_quant.known_level_set()
        self.input_spec = "" if self.input_levels is None else self.input_levels.spec
        step = None if fake_quant is None else fake_quant.step()
        with torch.no_grad():
            weight_step = layer.weight_fake_quant.step()
            s, b = scale_and_bias(step, weight_step, layer.channels, bias, batch_norm)
        self.register_buffer("s", s)
        self.register_buffer("b", b)
        self.folds_batch_norm = batch_norm is not None
        self.wide = False
        if self.input_levels is not None:
            self.wide = largest_sum(self.weight.levels(), self.input_levels) > EXACT_SUM
            self.weight.drop_cache()

    def own_input(self, fake_quant: FakeQuantize | None) -> None:
        """Become standalone: take float and quantize it, by child ``quantize``."""
        self.standalone = True
        if fake_quant is not None:
            quantize = Quantize(fake_quant.alpha, fake_quant.known_level_set())
            self.add_module("quantize", quantize)

    def compute(self, input: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        x, product = input, self.product
        if self.folds_batch_norm and not product.channels_meet_batch_norm(x):
            raise TensorError(
                f"{self.kind} with batch norm folded in got {x.dim()}-d input, whose channels "
                "batch norm would not see; calibrate with such input before convert_apot"
            )
        if isinstance(product, TransposedProduct):
            product = product.sized(x, self.weight.shape[2:], output_size)
        own = self._modules.get("quantize")
        if own is not None:
            x = own(x)
        size, weight = self.weight.group_size, self.weight.levels()
        if self.input_spec:
            x = torch.ops.apot_fx.levels(x, self.input_spec)
            y = product(x, weight, self.s, self.b, size, self.wide)
        else:
            y = product.weight_only(x, weight, self.s, self.b, size or weight[0].numel())
        return y.to(self.output_dtype)

    def check_state(self, state: Mapping[str, Any]) -> None:
        for key in ("s", "b"):
            value = state.get(key)
            if value is not None and not torch.isfinite(value).all():
                raise TensorError(f"{key}: holds NaN or inf; the file is damaged")
