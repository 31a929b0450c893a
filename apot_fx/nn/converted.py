"""Converted layers: packed integer weights, indices in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import TensorError
from ..fake_quant import FakeQuantize
from ..tensor import ApotTensor, keep_float32
from .fold import scale_and_bias
from .op import ConvertedOp
from .prepared import PreparedLayer
from .products import EXACT_SUM, Product, largest_sum
from .quantize import Quantize


class ConvertedLayer(ConvertedOp):
    """A Linear or convolution on packed weights; called as ``layer(x, *readers)``.

    ``x`` is a tensor of indices, or float where the layer is weight-only. Child ``weight`` is the
    :class:`ApotTensor`; buffers ``s`` (``(C,)`` or ``(C, groups)``) and ``b`` (``(C,)``), float32,
    hold the scale and bias with batch norm folded in.
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
        super().__init__()
        weight, bias = layer.operands(weight, bias)
        quant = layer.weight_fake_quant
        self.kind = layer.kind
        self.product: Product = layer.product
        self.output_dtype = weight.dtype
        self.weight = ApotTensor(
            layer.integer_weight(weight),
            quant.alpha,
            quant.known_level_set(),
            quant.axis,
            quant.group_size,
        )
        self.input_levels = None if fake_quant is None else fake_quant.known_level_set()
        self.input_spec = "" if self.input_levels is None else self.input_levels.spec
        step = None if fake_quant is None else fake_quant.step()
        with torch.no_grad():
            s, b = scale_and_bias(step, quant.step(), len(weight), bias, batch_norm)
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

    @property
    def weight_shape(self) -> torch.Size:
        return torch.Size(self.weight.shape)

    def compute(self, x: torch.Tensor) -> torch.Tensor:
        if self.folds_batch_norm and not self.product.channels_meet_batch_norm(x):
            raise TensorError(
                f"{self.kind} with batch norm folded in got {x.dim()}-d input, whose channels "
                "batch norm would not see; calibrate with such input before convert_apot"
            )
        own = self._modules.get("quantize")
        if own is not None:
            x = own(x)
        size, weight = self.weight.group_size, self.weight.levels()
        if self.input_spec:
            x = torch.ops.apot_fx.levels(x, self.input_spec)
            y = self.product(x, weight, self.s, self.b, size, self.wide)
        else:
            y = self.product.weight_only(x, weight, self.s, self.b, size or weight[0].numel())
        return y.to(self.output_dtype)

    def check_state(self, state: Mapping[str, Any]) -> None:
        for key in ("s", "b"):
            value = state.get(key)
            if value is not None and not torch.isfinite(value).all():
                raise TensorError(f"{key}: holds NaN or inf; the file is damaged")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        return super()._apply(keep_float32(fn), recurse)

    def extra_repr(self) -> str:
        inputs = self.input_levels or "float activations"
        return f"{self.kind}, {inputs} -> {tuple(self.weight.shape)}"
