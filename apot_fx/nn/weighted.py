"""What layers with one quantized weight have in common, in both stages."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from ..config import WeightSpec
from ..fake_quant import FakeQuantize
from ..levels import LevelSet
from ..tensor import ApotTensor
from .op import ConvertedOp, PreparedOp


class PreparedWeighted(PreparedOp):
    """Mixin of prepared layers with child ``weight_fake_quant``.

    Weights stay as the user's layer stores them; fake-quants and packed tensors see them as
    *rows*, with the output channel (an embedding's row) on axis 0.
    """

    float_type: ClassVar[type[nn.Module]]
    #: What the layer reads where nothing quantizes its input, for people.
    float_input: ClassVar[str] = "float"
    #: Where (``file.py:12``) other code reads its weight without calling it: then it stays float.
    read_at: str = ""
    weight_fake_quant: FakeQuantize
    weight_shape: torch.Size  # as the user's layer stores it
    channels: int
    float_class: type[nn.Module]  # of the layer it was: float_type, or one that computes the same

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
        prepared = cls.__new__(cls)
        prepared.__dict__.update(layer.__dict__)
        rows = prepared.rows(value.detach())
        fake_quant = FakeQuantize.for_weight(rows, spec, f"{name}.weight")
        prepared.weight_fake_quant = fake_quant.train(layer.training)
        prepared.weight_shape = value.shape
        prepared.channels = len(rows)
        prepared.float_class = type(layer)
        return prepared

    def in_float(self) -> nn.Module:
        """The float layer again, with the same Parameters."""
        layer = self.float_class.__new__(self.float_class)
        layer.__dict__.update(self.__dict__)
        ours = ("weight_fake_quant", "activation_post_process")
        layer._modules = {k: m for k, m in self._modules.items() if k not in ours}
        return layer

    @property
    def kind(self) -> str:
        """What the layer computes, for people."""
        return self.float_type.__name__

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight as rows."""
        return weight

    def operands(
        self, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a call: those that it was given, or the module's own."""
        if weight is not None:
            return weight, bias
        own, offset = self.weight, getattr(self, "bias", None)
        assert isinstance(own, torch.Tensor) and not isinstance(offset, nn.Module)
        return own, offset

    @torch.no_grad()
    def integer_weight(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The weight's indices now (uint8 or int16), as rows."""
        quant = self.weight_fake_quant
        value, _ = self.operands(weight, None)
        return torch.ops.apot_fx.quantize(
            self.rows(value.detach()),
            quant.clamped_alpha(),
            quant.level_spec,
            quant.axis,
            quant.group_size,
        )


class ConvertedWeighted(ConvertedOp):
    """Base of converted layers: child ``weight``, an :class:`ApotTensor` of rows."""

    weight: ApotTensor
    input_spec = ""
    input_levels: LevelSet | None = None

    def __init__(self, layer: PreparedWeighted, weight: torch.Tensor) -> None:
        super().__init__()
        quant = layer.weight_fake_quant
        self.kind = layer.kind
        self.float_input = layer.float_input
        self.output_dtype = weight.dtype
        self.weight_shape = weight.shape  # as the user's layer stores it
        self.weight = ApotTensor(
            layer.integer_weight(weight),
            quant.alpha,
            quant.known_level_set(),
            quant.axis,
            quant.group_size,
        )

    def extra_repr(self) -> str:
        inputs = self.input_levels or f"{self.float_input} input"
        return f"{self.kind}, {inputs} -> {tuple(self.weight_shape)}"
