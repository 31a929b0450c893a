"""A third interpreter of prepared models, in NumPy, from the contract's text alone.

It shares no code with ``kernels/`` or ``nn/``: integers are int64, scales float32, one rounding per
operation. It reads a prepared graph's structure and plain attributes; float ops run in torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx, nn

F32, F64 = np.float32, np.float64


def nearest(x: np.ndarray, alpha: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """Integer levels of ``x`` (contract 4.1); α broadcasts."""
    unit = F32(2 * max(abs(level) for level in levels))
    alpha = np.clip(alpha.astype(F32), F32(2.0**-40), F32(2.0**40))
    with np.errstate(over="ignore", invalid="ignore"):
        t = x.astype(F32) * (unit / alpha)
    table = np.array(levels, dtype=np.int64)
    thresholds = table[:-1] + table[1:]
    t = np.where(np.isnan(t), F32(0), t)
    c = np.ceil(np.clip(t, F32(2 * levels[0] - 1), F32(2 * levels[-1] + 1))).astype(np.int64)
    return table[np.searchsorted(thresholds, c, side="left")]


def step_of(alpha: np.ndarray, levels: tuple[int, ...]) -> np.ndarray:
    """α / M."""
    clamped = np.clip(alpha.astype(F32), F32(2.0**-40), F32(2.0**40))
    return clamped / F32(max(abs(level) for level in levels))


def convolve(x: np.ndarray, w: np.ndarray, conv: Any) -> np.ndarray:
    """int64 convolution over all trailing axes, by plain loops over the kernel's places."""
    rank = w.ndim - 2
    out_channels, per_group = w.shape[:2]
    spans = [d * (k - 1) + 1 for d, k in zip(conv.dilation, w.shape[2:], strict=True)]
    sizes = [(x.shape[2 + a] - spans[a]) // conv.stride[a] + 1 for a in range(rank)]
    out = np.zeros((x.shape[0], out_channels, *sizes), dtype=np.int64)
    each = out_channels // conv.groups
    for place in np.ndindex(*w.shape[2:]):
        window = tuple(
            slice(p * conv.dilation[a], p * conv.dilation[a] + (sizes[a] - 1) * conv.stride[a] + 1,
                  conv.stride[a])
            for a, p in enumerate(place)
        )  # fmt: skip
        seen = x[(slice(None), slice(None), *window)]
        for group in range(conv.groups):
            rows = slice(group * each, (group + 1) * each)
            inputs = seen[:, group * per_group : (group + 1) * per_group]
            weights = w[(rows, slice(None), *place)]
            out[:, rows] += np.einsum("oi,bi...->bo...", weights, inputs)
    return out


def pad(x: np.ndarray, conv: Any) -> np.ndarray:
    """The convolution's own padding of integer levels, every mode."""
    rank = len(conv.kernel_size)
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        edges = [(t // 2, t - t // 2) for t in total]
    elif conv.padding == "valid":
        edges = [(0, 0)] * rank
    else:
        edges = [(p, p) for p in conv.padding]
    modes = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}
    return np.pad(x, [(0, 0), (0, 0), *edges], mode=modes[conv.padding_mode])


def scale_and_bias(
    step_x: np.ndarray, step_w: np.ndarray, layer: Any, norm: Any
) -> tuple[np.ndarray, np.ndarray]:
    """``s`` and ``b`` (contract 4.6); step_w is (C,) or (C, groups)."""
    channels = len(layer.weight)
    bias = np.zeros(channels) if layer.bias is None else _numpy(layer.bias)
    if norm is None:
        return (step_x * step_w).astype(F32), bias.astype(F32) + F32(0)
    variance, mean = _numpy(norm.running_var).astype(F64), _numpy(norm.running_mean).astype(F64)
    gamma = np.ones(channels) if norm.weight is None else _numpy(norm.weight).astype(F64)
    beta = np.zeros(channels) if norm.bias is None else _numpy(norm.bias).astype(F64)
    g = gamma / np.sqrt(variance + F64(norm.eps))
    wide = g.reshape(-1, *[1] * (step_w.ndim - 1))
    s = (step_x.astype(F64) * step_w.astype(F64) * wide).astype(F32)
    return s, (beta + (bias.astype(F64) - mean) * g).astype(F32) + F32(0)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def integer_layer(layer: Any, x: np.ndarray, quant: Any, norm: Any) -> np.ndarray:
    """A prepared layer in eval, from its float input on the grid."""
    weight_quant, weight = layer.weight_fake_quant, _numpy(layer.weight)
    alpha, levels = _numpy(weight_quant.alpha), weight_quant.level_set.levels
    flat = weight.reshape(len(weight), -1)
    size = weight_quant.group_size
    per_weight = (
        alpha.reshape(-1, 1)
        if alpha.ndim < 2
        else (np.repeat(alpha, size, axis=1)[:, : flat.shape[1]])
    )
    q_w = nearest(flat, per_weight, levels)
    step_w = step_of(alpha, levels)
    if alpha.ndim == 0:
        step_w = np.repeat(step_w, len(weight))
    s, b = scale_and_bias(step_of(_numpy(quant.alpha), quant.level_set.levels), step_w, layer, norm)
    q_x = nearest(x, _numpy(quant.alpha), quant.level_set.levels)
    if isinstance(layer, nn.Linear):
        sums, shape = (lambda w: q_x @ w.T), (-1,)
    else:
        padded = pad(q_x, layer)
        sums = lambda w: convolve(padded, w.reshape(layer.weight.shape), layer)  # noqa: E731
        shape = (-1, *[1] * (layer.weight.dim() - 2))
    if s.ndim == 1:
        return sums(q_w).astype(F32) * s.reshape(shape) + b.reshape(shape)
    total = F32(0)
    for group in range(s.shape[1]):
        inside = np.arange(flat.shape[1]) // size == group
        total = total + sums(q_w * inside).astype(F32) * s[:, group].reshape(shape)
    return total + b.reshape(shape)


class Oracle(fx.Interpreter):
    """Runs a prepared model in eval: quantizers and layers in NumPy, the rest in torch."""

    def run_node(self, n: fx.Node) -> Any:
        args, _ = self.fetch_args_kwargs_from_env(n)
        module = self.module.get_submodule(str(n.target)) if n.op == "call_module" else None
        if module is not None and hasattr(module, "level_set") and hasattr(module, "observer"):
            x, levels = args[0], module.level_set.levels
            q = nearest(_numpy(x), _numpy(module.alpha), levels)
            y = q.astype(F32) * step_of(_numpy(module.alpha), levels)
            return torch.empty_like(x).copy_(torch.from_numpy(np.asarray(y)))
        if module is not None and hasattr(module, "weight_fake_quant"):
            quant, norm = (*args[1:], None, None)[:2]
            y = integer_layer(module, _numpy(args[0]), quant, norm)
            return torch.from_numpy(np.ascontiguousarray(y))
        return super().run_node(n)
