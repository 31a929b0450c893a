"""The ``apot_fx::`` operators: schema, implementation, fake and autograd, side by side.

Operators take the level set as its spec string, so that graphs and exported programs name it in
full and no table travels as a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import TensorError
from ..levels import LevelSet
from . import dispatch, products, reference, sums

_LIBRARY = torch.library.Library("apot_fx", "DEF")
_WHERE = "int? axis=None, int? group_size=None"


def _define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"apot_fx::{name}", fake, lib=_LIBRARY)


def _fake_index(x: torch.Tensor, alpha: torch.Tensor, level_set: str, *where: Any) -> torch.Tensor:
    return torch.empty_like(x, dtype=reference.index_dtype(level_set))


def _fake_values(
    index: torch.Tensor, alpha: torch.Tensor, level_set: str, *where: Any
) -> torch.Tensor:
    return torch.empty_like(index, dtype=reference.working_dtype(alpha))


def _fake_fake_quantize(
    x: torch.Tensor,
    alpha: torch.Tensor,
    level_set: str,
    axis: int | None = None,
    group_size: int | None = None,
    grad: str = "ste",
    nan_to_zero: bool = False,
) -> torch.Tensor:
    dtype = reference.working_dtype(x) if nan_to_zero else x.dtype
    return torch.empty_like(x, dtype=dtype)


def _fake_backward(
    grad: torch.Tensor, x: torch.Tensor, alpha: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(alpha)


def _levels(index: torch.Tensor, level_set: str) -> torch.Tensor:
    return reference.to_level(index, level_set, torch.float32)


def _fake_levels(x: torch.Tensor, *rest: Any) -> torch.Tensor:
    return torch.empty_like(x, dtype=torch.float32)


def _fake_pack(index: torch.Tensor, bits: int) -> torch.Tensor:
    return index.new_empty((index.numel() * bits + 7) // 8, dtype=torch.uint8)


def _fake_unpack(packed: torch.Tensor, bits: int, shape: list[int]) -> torch.Tensor:
    return packed.new_empty(shape, dtype=torch.uint8 if bits <= 8 else torch.int16)


def _fake_packed(x: torch.Tensor, alpha: torch.Tensor, level_set: str, *where: Any) -> torch.Tensor:
    return _fake_pack(x, LevelSet.parse(level_set).bits)


def _fake_ends(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(2, dtype=torch.float32)


def _fake_histogram(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_ends(x), x.new_empty((2, reference.BINS), dtype=torch.int64)


def _fake_linear(x: torch.Tensor, w: torch.Tensor, *rest: Any) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]), dtype=torch.float32)


_define(f"quantize(Tensor x, Tensor alpha, str level_set, {_WHERE}) -> Tensor",
        dispatch.quantize, _fake_index)  # fmt: skip
_define(f"dequantize(Tensor index, Tensor alpha, str level_set, {_WHERE}) -> Tensor",
        dispatch.dequantize, _fake_values)  # fmt: skip
_define(f"fake_quantize(Tensor x, Tensor alpha, str level_set, {_WHERE}, str grad='ste', "
        "bool nan_to_zero=False) -> Tensor",
        dispatch.fake_quantize, _fake_fake_quantize)  # fmt: skip
_define("fake_quantize_backward(Tensor grad, Tensor x, Tensor alpha, str level_set, int? axis, "
        "int? group_size, str mode) -> (Tensor, Tensor)",
        dispatch.fake_quantize_backward, _fake_backward)  # fmt: skip
_define(f"quantize_packed(Tensor x, Tensor alpha, str level_set, {_WHERE}) -> Tensor",
        dispatch.quantize_packed, _fake_packed)  # fmt: skip
_define("ends(Tensor x) -> Tensor", dispatch.ends, _fake_ends)
_define("histogram(Tensor x) -> (Tensor, Tensor)", dispatch.histogram, _fake_histogram)
_define("levels(Tensor index, str level_set) -> Tensor", _levels, _fake_levels)
_define(f"to_levels(Tensor x, Tensor alpha, str level_set, {_WHERE}) -> Tensor",
        reference.to_levels, _fake_levels)  # fmt: skip
_define("pack(Tensor index, int bits) -> Tensor", dispatch.pack, _fake_pack)
_define("unpack(Tensor packed, int bits, SymInt[] shape) -> Tensor",
        dispatch.unpack, _fake_unpack)  # fmt: skip
_define("linear(Tensor x, Tensor w, Tensor s, Tensor b, bool wide) -> Tensor",
        products.linear, _fake_linear)  # fmt: skip
_define("linear_grouped(Tensor x, Tensor w, Tensor s, Tensor b, int group_size, bool wide) "
        "-> Tensor", products.linear_grouped, _fake_linear)  # fmt: skip
_define("linear_weight_only(Tensor x, Tensor w, Tensor step, Tensor b, int group_size) -> Tensor",
        products.linear_weight_only, _fake_linear)  # fmt: skip
# The fakes of these run the same calls on fake tensors: strides follow the engine's rules.
_define("matmul(Tensor a, Tensor b, Tensor s, bool wide) -> Tensor",
        products.matmul, products.matmul)  # fmt: skip
_define("einsum(Tensor a, Tensor b, Tensor s, str equation, bool wide) -> Tensor",
        products.einsum, products.einsum)  # fmt: skip
_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups"
_define(f"conv(Tensor x, Tensor w, Tensor s, Tensor b, {_GEOMETRY}, bool wide) -> Tensor",
        products.conv, products.conv)  # fmt: skip
_define(f"conv_grouped(Tensor x, Tensor w, Tensor s, Tensor b, {_GEOMETRY}, int group_size, "
        "bool wide) -> Tensor", products.conv_grouped, products.conv_grouped)  # fmt: skip
_GEOMETRY = "int[] stride, int[] padding, int[] output_padding, int[] dilation, int groups"
_define(f"conv_transpose(Tensor x, Tensor w, Tensor s, Tensor b, {_GEOMETRY}, bool wide) -> Tensor",
        products.conv_transpose, products.conv_transpose)  # fmt: skip
_define(f"conv_transpose_grouped(Tensor x, Tensor w, Tensor s, Tensor b, {_GEOMETRY}, "
        "int group_size, bool wide) -> Tensor",
        products.conv_transpose_grouped, products.conv_transpose_grouped)  # fmt: skip


def _save_fake_quantize(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, alpha, ctx.level_set, ctx.axis, ctx.group_size, ctx.mode, _ = inputs
    ctx.save_for_backward(x, alpha)


def _fake_quantize_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    x, alpha = ctx.saved_tensors
    dx, dalpha = torch.ops.apot_fx.fake_quantize_backward(
        grad, x, alpha, ctx.level_set, ctx.axis, ctx.group_size, ctx.mode
    )
    return dx, dalpha if ctx.mode == "rcf" else None, None, None, None, None, None


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_second_gradient(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    raise TensorError("fake_quantize has no second gradient; detach, or create_graph=False")


def _save_dequantize(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    index, ctx.alpha, ctx.level_set, ctx.axis, ctx.group_size = inputs
    ctx.save_for_backward(index)


def _dequantize_gradient(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """dα = Σ grad · q / M: a dequantized value is linear in its α."""
    (index,) = ctx.saved_tensors
    one = torch.full_like(ctx.alpha, 1.0)
    shares = torch.ops.apot_fx.dequantize(index, one, ctx.level_set, ctx.axis, ctx.group_size)
    dalpha = sums.reduce_to_alpha(grad * shares, ctx.alpha, ctx.axis, ctx.group_size)
    return None, dalpha.to(ctx.alpha.dtype), None, None, None


torch.library.register_autograd(
    "apot_fx::fake_quantize",
    _fake_quantize_gradient,
    setup_context=_save_fake_quantize,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "apot_fx::fake_quantize_backward",
    _no_second_gradient,
    setup_context=_save_nothing,
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "apot_fx::dequantize", _dequantize_gradient, setup_context=_save_dequantize, lib=_LIBRARY
)
