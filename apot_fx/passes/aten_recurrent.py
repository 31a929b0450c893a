"""Recurrent layers in an exported graph: one operator call on all of their weights."""

from __future__ import annotations

import operator
from itertools import product
from typing import Any

from torch import fx, nn

from ..graph import KIND
from .aten_layers import LayerCall, Shape
from .operators import base_name, bound_arguments, operator_of

_KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
    "rnn_tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
}


def recurrent_call(node: fx.Node, shape: Shape) -> LayerCall | None:
    """The recurrent layer that an operator call stands for; None for anything else."""
    called = operator_of(node)
    if called is None or base_name(called) not in _KINDS or called._overloadname != "input":
        return None
    bound = bound_arguments(node)
    names = _weight_names(bound["num_layers"], bound["bidirectional"], bound["has_biases"])
    members = all(user.target is operator.getitem for user in node.users)
    if len(names) != len(bound["params"]) or not members:  # more of them: projections
        return None
    tensors = dict(zip(names, bound["params"], strict=True))
    try:
        rows, width = shape(tensors["weight_ih_l0"])
    except LookupError:
        return None
    kind, options = _KINDS[base_name(called)]
    hidden = rows // {nn.LSTM: 4, nn.GRU: 3}.get(kind, 1)
    options = {**options, "input_size": width, "hidden_size": hidden, "bias": bound["has_biases"]}
    options |= {key: bound[key] for key in ("num_layers", "dropout", "bidirectional")}
    options["batch_first"] = bound["batch_first"]
    state = bound["hx"]
    state = tuple(state) if isinstance(state, (tuple, list)) else state
    return LayerCall(
        kind, bound["input"], options, tensors, training=bool(bound["train"]), state=state
    )


def _weight_names(layers: int, bidirectional: bool, biases: bool) -> list[str]:
    stems = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if biases else ()))
    ends = ("", "_reverse") if bidirectional else ("",)
    return [f"{stem}_l{n}{end}" for n, end, stem in product(range(layers), ends, stems)]


def member(call: fx.Node, place: int, layer: LayerCall) -> fx.Node:
    """The value that the operator gives at a place, taken from what the layer's call gives."""
    graph = call.graph
    if place == 0 or not isinstance(layer.state, tuple):
        return graph.call_function(operator.getitem, (call, place))
    states = graph.call_function(operator.getitem, (call, 1))
    states.meta[KIND] = "tuple"
    return graph.call_function(operator.getitem, (states, place - 1))
