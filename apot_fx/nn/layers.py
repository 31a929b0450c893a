"""Which prepared layer stands for which layer of torch's (and of transformers')."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .convolution import ConvProduct, TransposedProduct
from .data_alpha import on_data
from .fold import BATCH_NORMS, is_foldable
from .prepared import Call, FunctionalLayer, PreparedFunctional, PreparedLayer
from .products import LinearProduct, Product

#: transformers' Linear with a transposed weight, by name: transformers is never imported.
CONV1D = "transformers.pytorch_utils.Conv1D"


class PreparedLinear(PreparedLayer, nn.Linear):  # type: ignore[misc]
    float_type = nn.Linear

    @property
    def product(self) -> LinearProduct:
        return LinearProduct()


class PreparedTransformersConv1D(PreparedLayer):
    """transformers' Conv1D: a Linear whose weight is stored (in, out)."""

    float_type = nn.Module  # its own class is not imported

    @property
    def kind(self) -> str:
        return "Conv1D"

    @property
    def product(self) -> LinearProduct:
        return LinearProduct(transposed=True)

    def weighted(
        self, product: Product, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        assert bias is not None
        flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
        return flat.view(*x.shape[:-1], weight.shape[1])


class _PreparedConvolution(PreparedLayer):
    @property
    def product(self) -> ConvProduct:
        return ConvProduct.of(self)  # type: ignore[arg-type]

    def weighted(
        self, product: Product, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return on_data(self._conv_forward, x, weight, bias)  # type: ignore[arg-type]


class PreparedConv1d(_PreparedConvolution, nn.Conv1d):  # type: ignore[misc]
    float_type = nn.Conv1d


class PreparedConv2d(_PreparedConvolution, nn.Conv2d):  # type: ignore[misc]
    float_type = nn.Conv2d


class PreparedConv3d(_PreparedConvolution, nn.Conv3d):  # type: ignore[misc]
    float_type = nn.Conv3d


class _PreparedTransposed(PreparedLayer):
    """Standalone, it is called as ``layer(input, output_size)``."""

    @property
    def product(self) -> TransposedProduct:
        return TransposedProduct.of(self)  # type: ignore[arg-type]

    def forward(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.standalone:
            return super().forward(input, *args, **kwargs)
        return self.run(input, self._sized(input, *args, **kwargs))

    @torch.no_grad()
    def distance_of_forms(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> float:
        if not self.standalone:
            return super().distance_of_forms(input, *args, **kwargs)
        return self.distance(input, self._sized(input, *args, **kwargs))

    def _sized(self, input: torch.Tensor, output_size: Any = None) -> Call:
        weight, bias = self.operands(None, None)
        product = self.product.sized(input, weight.shape[2:], output_size)
        return Call(product, None, None, weight, bias)


class PreparedConvTranspose1d(_PreparedTransposed, nn.ConvTranspose1d):  # type: ignore[misc]
    float_type = nn.ConvTranspose1d


class PreparedConvTranspose2d(_PreparedTransposed, nn.ConvTranspose2d):  # type: ignore[misc]
    float_type = nn.ConvTranspose2d


class PreparedConvTranspose3d(_PreparedTransposed, nn.ConvTranspose3d):  # type: ignore[misc]
    float_type = nn.ConvTranspose3d


_KINDS: tuple[type[PreparedLayer], ...] = (
    PreparedLinear, PreparedConv1d, PreparedConv2d, PreparedConv3d, PreparedConvTranspose1d,
    PreparedConvTranspose2d, PreparedConvTranspose3d, PreparedFunctional,
)  # fmt: skip

#: Which prepared layer stands for which float layer. Subclasses of these may compute something
#: else, so only exact types are taken; attention's own Linear is one with another name.
PREPARED: dict[type[nn.Module], type[PreparedLayer]] = {
    **{kind.float_type: kind for kind in _KINDS},
    NonDynamicallyQuantizableLinear: PreparedLinear,
}

#: Layers whose calls may ask for an output size.
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_conv1d(kind: type) -> bool:
    """Whether a class is transformers' Conv1D."""
    return f"{kind.__module__}.{kind.__qualname__}" == CONV1D


def prepared_type(kind: type[nn.Module]) -> type[PreparedLayer] | None:
    """The prepared layer of a float layer's exact type, if there is one."""
    return PreparedTransformersConv1D if is_conv1d(kind) else PREPARED.get(kind)


def can_fold(layer: nn.Module, batch_norm: nn.Module, weight: torch.Tensor) -> str:
    """Why ``batch_norm`` can't be folded into ``layer``'s calls; ``""`` where it can.

    ``weight``: of the layer's calls, as the float layer stores it.
    """
    geometry = layer.geometry if isinstance(layer, FunctionalLayer) else layer
    rank = len(getattr(geometry, "stride", (1,)))  # Linear has none and goes with BatchNorm1d
    if BATCH_NORMS[rank - 1] is not type(batch_norm) or (
        getattr(batch_norm, "num_features", None) != _channels(layer, weight)
    ):
        return f"{type(batch_norm).__name__} normalises another axis than the layer's channels"
    if not is_foldable(batch_norm):
        return "batch norm has no running statistics"
    return ""


def _channels(layer: nn.Module, weight: torch.Tensor) -> int:
    product: Any = getattr(layer, "geometry", None)
    if isinstance(layer, TRANSPOSED):
        product = TransposedProduct.of(layer)
    elif is_conv1d(type(layer)):
        product = LinearProduct(transposed=True)
    return len(weight) if product is None else len(product.rows(weight))
