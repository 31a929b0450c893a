"""The geometry and the gates of recurrent layers, which know nothing of quantization.

A layer is taken apart into *products*, named as torch names its weights: ``ih_l0`` (input to
gates), ``hh_l0`` (state to gates), ``hr_l0`` (projection), with ``_reverse`` for the backward
direction; a cell has ``ih`` and ``hh``. Whoever runs it brings the products.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import TensorError

#: What a product computes: ``x @ wᵀ + b`` of (rows, features), in one of its forms.
Products = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Steps:
    """Input in packed form: step t reads the first ``sizes[t]`` rows of every state."""

    data: torch.Tensor  # (sum of sizes, features), step after step
    sizes: list[int]
    states: tuple[torch.Tensor, ...]  # h, and c for LSTM: (layers · directions, batch, width)


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """Geometry and gates of a recurrent layer; whoever runs it brings the products."""

    kind: str  # the class name in torch
    mode: str  # "LSTM", "GRU", "RNN_TANH" or "RNN_RELU"
    input_size: int
    hidden_size: int
    num_layers: int = 1
    directions: int = 1
    batch_first: bool = False
    proj_size: int = 0

    @classmethod
    def of(cls, layer: Any) -> Recurrence:
        """Of a torch module, or of what took it over."""
        kind = getattr(layer, "float_type", type(layer)).__name__
        if isinstance(layer, nn.RNNCellBase):
            mode = kind.removesuffix("Cell")
            if isinstance(layer, nn.RNNCell):
                mode = f"RNN_{layer.nonlinearity.upper()}"
            return cls(kind, mode, layer.input_size, layer.hidden_size)
        sizes = layer.input_size, layer.hidden_size, layer.num_layers
        return cls(
            kind, layer.mode, *sizes, 1 + layer.bidirectional, layer.batch_first, layer.proj_size
        )

    @property
    def is_cell(self) -> bool:
        return self.kind.endswith("Cell")

    @property
    def suffixes(self) -> list[str]:
        """What names carry, per layer and direction."""
        ends = ("", "_reverse")[: self.directions]
        return (
            [""]
            if self.is_cell
            else [f"_l{n}{end}" for n in range(self.num_layers) for end in ends]
        )

    @property
    def keys(self) -> list[str]:
        """Names of the products."""
        kinds = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        return [kind + suffix for suffix in self.suffixes for kind in kinds]

    def enter(self, input: torch.Tensor | PackedSequence, hx: Any) -> Steps:
        """The arguments of torch's forward; raises TensorError for a shape that torch refuses."""
        if isinstance(input, PackedSequence):
            data, sizes = input.data, input.batch_sizes.tolist()
            states = self._states(data, sizes[0], True, hx)
            if input.sorted_indices is not None:
                states = tuple(state.index_select(1, input.sorted_indices) for state in states)
        else:
            rank = 2 if self.is_cell else 3
            if input.dim() not in (rank - 1, rank):
                raise TensorError(
                    f"{self.kind}: input is {input.dim()}-d, not {rank - 1}-d or {rank}-d"
                )
            batched = input.dim() == rank
            x = input if batched else input.unsqueeze(self._batch_axis)
            x = x.unsqueeze(0) if self.is_cell else x.transpose(0, 1) if self.batch_first else x
            data, sizes = x.reshape(-1, x.shape[-1]), [x.shape[1]] * x.shape[0]
            states = self._states(data, x.shape[1], batched, hx)
        if data.shape[-1] != self.input_size or not sizes:
            raise TensorError(
                f"{self.kind}: input is {len(sizes)} steps of {data.shape[-1]} features; at least "
                f"one step of {self.input_size} is wanted"
            )
        return Steps(data, sizes, states)

    @property
    def _batch_axis(self) -> int:
        return 0 if self.is_cell or self.batch_first else 1

    def _states(
        self, data: torch.Tensor, batch: int, batched: bool, hx: Any
    ) -> tuple[torch.Tensor, ...]:
        widths = [self.proj_size or self.hidden_size]
        widths += [self.hidden_size] if self.mode == "LSTM" else []
        places = len(self.suffixes)
        if hx is None:
            return tuple(data.new_zeros(places, batch, width) for width in widths)
        outer = [*([] if self.is_cell else [places]), *([batch] if batched else [])]
        given = tuple(hx) if self.mode == "LSTM" else (hx,)
        found, wanted = [list(h.shape) for h in given], [[*outer, width] for width in widths]
        if found != wanted:
            raise TensorError(f"{self.kind}: hx has shape {found}, but {wanted} is wanted")
        return tuple(
            h.reshape(places, batch, width) for h, width in zip(given, widths, strict=True)
        )

    def leave(self, input: torch.Tensor | PackedSequence, results: Sequence[torch.Tensor]) -> Any:
        """What torch's forward returns, of :meth:`run`'s results."""
        output, states = results[0], list(results[1:])
        if isinstance(input, PackedSequence):
            order = input.unsorted_indices
            if order is not None:
                states = [state.index_select(1, order) for state in states]
            whole: Any = PackedSequence(output, input.batch_sizes, input.sorted_indices, order)
        else:
            batched = input.dim() == (2 if self.is_cell else 3)
            whole = output.unflatten(0, (-1, states[0].shape[1]))
            whole = whole.transpose(0, 1) if self.batch_first else whole
            whole = whole if batched else whole.squeeze(self._batch_axis)
            states = [state if batched else state.squeeze(1) for state in states]
        if self.is_cell:
            states = [state.squeeze(0) for state in states]
        state = states[0] if len(states) == 1 else tuple(states)
        return state if self.is_cell else (whole, state)

    def run(self, products: Products, steps: Steps, dropout: float = 0.0) -> list[torch.Tensor]:
        """All layers; output in packed form, then the final states, as ``steps.states``."""
        data, finals = steps.data, []
        for layer in range(self.num_layers):
            outputs = []
            for place in range(layer * self.directions, (layer + 1) * self.directions):
                first = [state[place] for state in steps.states]
                output, final = self._direction(products, place, data, steps.sizes, first)
                outputs.append(output)
                finals.append(final)
            data = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if dropout and layer + 1 < self.num_layers:
                data = functional.dropout(data, dropout)
        return [data, *(torch.stack(parts) for parts in zip(*finals, strict=True))]

    def _direction(
        self,
        products: Products,
        place: int,
        data: torch.Tensor,
        sizes: list[int],
        state: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """One layer in one direction: its output in packed form and the final state."""
        suffix = self.suffixes[place]
        from_input = products[f"ih{suffix}"](data).split(sizes)
        outputs: list[torch.Tensor] = [data] * len(sizes)
        backward = self.directions == 2 and place % 2 == 1
        for step in reversed(range(len(sizes))) if backward else range(len(sizes)):
            size = sizes[step]
            running = [part[:size] for part in state]
            moved = self._gates(from_input[step], products[f"hh{suffix}"](running[0]), running)
            if self.proj_size:
                moved[0] = products[f"hr{suffix}"](moved[0])
            outputs[step] = moved[0]
            # Rows beyond have ended (forward) or not begun (backward): they keep their state.
            state = [
                new if size == len(old) else torch.cat([new, old[size:]])
                for new, old in zip(moved, state, strict=True)
            ]
        return torch.cat(outputs), state

    def _gates(
        self, a: torch.Tensor, b: torch.Tensor, state: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The next state, from both products; torch's formulas, one rounding per operation."""
        if self.mode == "LSTM":
            enter, forget, new, leave = (a + b).chunk(4, -1)
            c = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
            return [leave.sigmoid() * c.tanh(), c]
        if self.mode == "GRU":
            (reset_a, keep_a, new_a), (reset_b, keep_b, new_b) = a.chunk(3, -1), b.chunk(3, -1)
            new = (new_a + (reset_a + reset_b).sigmoid() * new_b).tanh()
            return [(state[0] - new) * (keep_a + keep_b).sigmoid() + new]
        return [(a + b).tanh() if self.mode == "RNN_TANH" else (a + b).relu()]
