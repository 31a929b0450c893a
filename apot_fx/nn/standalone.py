"""Standalone layers: prepared and converted forms that any Python code calls as the float layer.

They own the quantizer of their input and take and give float. Recurrent layers always are; Linear
and convolutions where no graph holds their call, or where a user's hooks watch it.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..config import QConfig
from ..fake_quant import FakeQuantize
from .converted import ConvertedLayer
from .op import ConvertedOp, PreparedOp
from .prepared import PREPARED, FunctionalLayer, PreparedLayer
from .recurrent import RECURRENT, PreparedRecurrent

#: Layer types that have a standalone form.
STANDALONE = frozenset((PREPARED.keys() | RECURRENT.keys()) - {FunctionalLayer})

#: Where nn.Module keeps hooks: the user's stay with the layer.
_HOOKS = tuple(name for name in nn.Module().__dict__ if "_hooks" in name)


#: Hooks of torch that compute a weight before every forward; a packed weight needs them no more.
_COMPUTES_WEIGHT = (WeightNorm, SpectralNorm)


def has_hooks(module: nn.Module) -> bool:
    """Whether a user's code watches the calls of a module."""
    return any(getattr(module, name) for name in _HOOKS if "forward" in name)


def prepare_standalone(layer: nn.Module, config: QConfig, name: str) -> PreparedOp:
    """Turn a float layer of a type in STANDALONE into its prepared form.

    Raises TensorError naming a weight that holds NaN or inf.
    """
    kind = RECURRENT.get(type(layer))
    if kind is not None:
        recurrent: PreparedRecurrent = kind.take_over(layer, config, name)
        return recurrent
    assert config.weight is not None
    prepared: PreparedLayer = PREPARED[type(layer)].take_over(layer, config.weight, name)
    prepared.standalone = True
    if config.activation is not None:
        device = next(prepared.parameters()).device
        quant = FakeQuantize.for_activation(config.activation).to(device)
        prepared.add_module("activation_post_process", quant.train(layer.training))
    return prepared


def convert_standalone(op: PreparedOp, low_memory: bool) -> ConvertedOp:
    """The converted form of a standalone layer, in eval, with its hooks."""
    made: ConvertedOp
    with torch.no_grad():
        for hook in op._forward_pre_hooks.values():
            if isinstance(hook, _COMPUTES_WEIGHT):
                hook(op, None)
    if isinstance(op, PreparedRecurrent):
        made = op.converted(low_memory)
    else:
        assert isinstance(op, PreparedLayer)
        layer = ConvertedLayer(op, op.own_fake_quant, None)
        layer.own_input(op.own_fake_quant)
        layer.weight.keep_decoded = not low_memory
        made = layer.eval()
    for name in _HOOKS:
        made.__dict__[name] = hooks = op.__dict__[name]
        if isinstance(hooks, dict):
            kept = {k: hook for k, hook in hooks.items() if not isinstance(hook, _COMPUTES_WEIGHT)}
            made.__dict__[name] = type(hooks)(kept)
    return made


def input_fake_quants(op: PreparedOp) -> dict[str, FakeQuantize]:
    """The fake-quants of a standalone layer's inputs, by their name in it."""
    if isinstance(op, PreparedRecurrent):
        return op.input_fake_quants
    quant = op.own_fake_quant if isinstance(op, PreparedLayer) else None
    return {} if quant is None else {"activation_post_process": quant}
