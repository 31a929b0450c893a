"""Standalone layers: prepared and converted forms that any Python code calls as the float layer.

They own the quantizer of their input and take and give float. Recurrent layers and embeddings
always are; Linear and convolutions where no graph holds their call, where a user's hooks watch it,
or where it asks for an output size.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..config import QConfig
from ..fake_quant import FakeQuantize
from .converted import ConvertedLayer
from .embedding import EMBEDDINGS, ConvertedEmbedding
from .layers import PREPARED, is_conv1d, prepared_type
from .op import ConvertedOp, PreparedOp
from .prepared import FunctionalLayer, PreparedLayer
from .recurrent import RECURRENT, PreparedRecurrent
from .weighted import ConvertedWeighted, PreparedWeighted

#: torch's layers that have a standalone form.
STANDALONE = frozenset((PREPARED.keys() | RECURRENT.keys() | EMBEDDINGS.keys()) - {FunctionalLayer})

#: Where nn.Module keeps hooks: the user's stay with the layer.
_HOOKS = tuple(name for name in nn.Module().__dict__ if "_hooks" in name)


#: Hooks of torch that compute a weight before every forward; a packed weight needs them no more.
_COMPUTES_WEIGHT = (WeightNorm, SpectralNorm, BasePruningMethod)


def has_hooks(module: nn.Module) -> bool:
    """Whether a user's code watches the calls of a module."""
    return any(getattr(module, name) for name in _HOOKS if "forward" in name)


def is_standalone_type(kind: type) -> bool:
    """Whether layers of exactly this type have a standalone form."""
    return kind in STANDALONE or is_conv1d(kind)


def prepare_standalone(layer: nn.Module, config: QConfig, name: str) -> PreparedOp:
    """Turn a float layer that :func:`is_standalone_type` knows into its prepared form.

    Raises TensorError naming a weight that holds NaN or inf.
    """
    recurrent = RECURRENT.get(type(layer))
    if recurrent is not None:
        made: PreparedRecurrent = recurrent.take_over(layer, config, name)
        return made
    assert config.weight is not None
    kind = EMBEDDINGS.get(type(layer)) or prepared_type(type(layer))
    assert kind is not None
    prepared: PreparedWeighted = kind.take_over(layer, config.weight, name)
    prepared.standalone = True
    if config.activation is not None and isinstance(prepared, PreparedLayer):
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
        made = _converted(op)
        made.weight.keep_decoded = not low_memory
        made.eval()
    for name in _HOOKS:
        made.__dict__[name] = hooks = op.__dict__[name]
        if isinstance(hooks, dict):
            kept = {k: hook for k, hook in hooks.items() if not isinstance(hook, _COMPUTES_WEIGHT)}
            made.__dict__[name] = type(hooks)(kept)
    return made


def _converted(op: PreparedOp) -> ConvertedWeighted:
    if isinstance(op, PreparedLayer):
        layer = ConvertedLayer(op, op.own_fake_quant, None)
        layer.own_input(op.own_fake_quant)
        return layer
    assert isinstance(op, PreparedWeighted)
    return ConvertedEmbedding(op)


def keep_children(old: nn.Module, new: nn.Module) -> None:
    """Let a converted layer hold what else the prepared one held: layers made of calls that use
    its weight, say."""
    for name, child in old._modules.items():
        if not isinstance(child, FakeQuantize) and name not in new._modules:
            new.add_module(name, child)


def input_fake_quants(op: PreparedOp) -> dict[str, FakeQuantize]:
    """The fake-quants that an operator owns, by their name in it: a standalone layer's inputs',
    an attention's softmax's."""
    if isinstance(op, PreparedRecurrent):
        return op.input_fake_quants
    quant = op._modules.get("activation_post_process")
    return {"activation_post_process": quant} if isinstance(quant, FakeQuantize) else {}
