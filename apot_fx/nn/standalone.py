"""Standalone layers: prepared and converted forms that any Python code calls as the float layer.

They own the quantizer of their input and take and give float. Recurrent layers always are; Linear
and convolutions where no graph holds their call, or where a user's hooks watch it.
"""

from __future__ import annotations

from torch import nn

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
    if isinstance(op, PreparedRecurrent):
        made = op.converted(low_memory)
    else:
        assert isinstance(op, PreparedLayer)
        layer = ConvertedLayer(op, op.own_fake_quant, None)
        layer.own_input(op.own_fake_quant)
        layer.weight.keep_decoded = not low_memory
        made = layer.eval()
    for hooks in _HOOKS:
        made.__dict__[hooks] = op.__dict__[hooks]
    return made


def input_fake_quants(op: PreparedOp) -> dict[str, FakeQuantize]:
    """The fake-quants that an operator owns, by their name in it: a standalone layer's inputs',
    an attention's softmax's."""
    if isinstance(op, PreparedRecurrent):
        return op.input_fake_quants
    quant = op._modules.get("activation_post_process")
    return {"activation_post_process": quant} if isinstance(quant, FakeQuantize) else {}
