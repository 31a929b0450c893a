"""Recurrent layers: torch's LSTM, GRU and RNN and their cells on quantized weights.

Both stages are called exactly as torch's module, so any Python code may call them; they own the
quantizers of their inputs. Products (see ``recurrence``) are sums of integers where inputs are
quantized; the gates between them are float32, by code that both stages share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as functional
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ..collectives import largest_of_ranks
from ..config import QConfig
from ..errors import TensorError
from ..fake_quant import EXACT_UNIT, FakeQuantize
from ..tensor import ApotTensor
from .fold import scale_and_bias
from .op import ConvertedOp, PreparedOp, with_gradient_of
from .products import EXACT_SUM, LinearProduct, largest_sum
from .quantize import Quantize
from .recurrence import Products, Recurrence, Steps


@dataclasses.dataclass(frozen=True, eq=False)  # torch.compile hashes one half made
class IntegerProduct:
    """``x @ wᵀ`` on levels (contract 4.6, 4.7); without a ``grid`` of float ``x`` (4.8)."""

    weight: torch.Tensor  # levels, float32
    s: torch.Tensor
    b: torch.Tensor
    group_size: int | None
    grid: tuple[torch.Tensor, str] | None  # the input's α and level set
    wide: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product, size = LinearProduct(), self.group_size
        if self.grid is None:
            group = size or self.weight.shape[1]
            return product.weight_only(x, self.weight, self.s, self.b, group)
        alpha, spec = self.grid
        levels = torch.ops.apot_fx.levels(torch.ops.apot_fx.quantize(x, alpha, spec), spec)
        return product(levels, self.weight, self.s, self.b, size, self.wide)


def run_integers(
    recurrence: Recurrence, products: Products, steps: Steps, dtype: torch.dtype
) -> list[torch.Tensor]:
    """The integer form of both stages: gates and states in float32, results in ``dtype``."""
    states = tuple(state.float() for state in steps.states)
    with torch.no_grad(), torch.autocast(steps.data.device.type, enabled=False):
        results = recurrence.run(products, dataclasses.replace(steps, states=states))
        return [result.to(dtype) for result in results]


class PreparedRecurrent(PreparedOp):
    """Mixin of the prepared recurrent layers, called as the torch layer beside it.

    Children ``weight_<product>_fake_quant`` and, unless weight-only,
    ``activation_post_process_<product>``, see :attr:`input_fake_quants`. With nothing quantizing
    torch's own forward runs; in train the float form with fake-quants and gradients; in eval the
    integers that the converted layer computes. An observer sees one tensor per forward: the
    product's inputs of all steps.
    """

    standalone = True
    float_type: ClassVar[type[nn.Module]]

    @property
    def kind(self) -> str:
        """What the layer computes, for people."""
        return self.float_type.__name__

    @classmethod
    def take_over(
        cls, layer: nn.Module, config: QConfig, name: str, signed: bool | None = None
    ) -> Any:
        """Turn a float layer into a prepared one: same Parameters, keys, hooks and mode.

        ``signed`` is what is proved about the layer's input (None: calibration says). Raises
        TensorError naming a weight that holds NaN or inf.
        """
        recurrence = Recurrence.of(layer)
        made: dict[str, FakeQuantize] = {}
        assert config.weight is not None
        for key in recurrence.keys:
            weight = getattr(layer, f"weight_{key}")
            quant = FakeQuantize.for_weight(weight, config.weight, f"{name}.weight_{key}")
            made[f"weight_{key}_fake_quant"] = quant
            if config.activation is not None:
                proved = _proved_sign(recurrence.mode, key, signed)
                quant = FakeQuantize.for_activation(config.activation, proved)
                assert quant.observer is not None
                quant.observer.zeros_are_filler = True
                made[f"activation_post_process_{key}"] = quant.to(weight.device)
        prepared = cls.__new__(cls)
        prepared.__dict__.update(layer.__dict__)
        for child, quant in made.items():
            prepared.add_module(child, quant.train(layer.training))
        return prepared

    @property
    def recurrence(self) -> Recurrence:
        return Recurrence.of(self)

    @property
    def weight_fake_quants(self) -> dict[str, FakeQuantize]:
        """By the name of the weight."""
        names = [f"weight_{key}" for key in self.recurrence.keys]
        return {name: self._modules[f"{name}_fake_quant"] for name in names}  # type: ignore[misc]

    @property
    def input_fake_quants(self) -> dict[str, FakeQuantize]:
        """By their name in this module; empty where the layer is weight-only."""
        names = [f"activation_post_process_{key}" for key in self.recurrence.keys]
        return {name: self._modules[name] for name in names if name in self._modules}  # type: ignore[misc]

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The quantized weights, by name."""
        return {name: getattr(self, name) for name in self.weight_fake_quants}

    def forward(self, input: torch.Tensor | PackedSequence, hx: Any = None) -> Any:
        quants = [*self.weight_fake_quants.values(), *self.input_fake_quants.values()]
        if any(quant.observer_enabled for quant in quants):
            self._observe(input, hx)
        if not any(quant.quantizes for quant in quants):
            return self.float_type.forward(self, input, hx)
        recurrence, dtype = self.recurrence, next(iter(self.weights.values())).dtype
        steps = recurrence.enter(input, hx)
        exact = all(quant.quantizes and quant.unit <= EXACT_UNIT for quant in quants)
        if self.training or not exact:
            return recurrence.leave(input, self._train_form(steps))
        results = run_integers(recurrence, self.integer_products(), steps, dtype)
        given = (steps.data, *steps.states, *self.parameters())
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
            train = self._train_form(steps)
            pairs = zip(results, train, strict=True)
            results = [with_gradient_of(value, like.to(dtype)) for value, like in pairs]
        return recurrence.leave(input, results)

    def _train_form(
        self, steps: Steps, seen: dict[str, list[torch.Tensor]] | None = None
    ) -> list[torch.Tensor]:
        """Fake-quantized products in float; ``seen`` collects their inputs."""

        def product(key: str) -> Callable[[torch.Tensor], torch.Tensor]:
            weight, bias = getattr(self, f"weight_{key}"), getattr(self, f"bias_{key}", None)
            quantized = self.weight_fake_quants[f"weight_{key}"](weight).to(weight.dtype)
            quant = self.input_fake_quants.get(f"activation_post_process_{key}")

            def compute(x: torch.Tensor) -> torch.Tensor:
                if seen is not None:
                    seen.setdefault(key, []).append(x)
                x = x if quant is None else quant.on_grid(x)
                return functional.linear(x.to(weight.dtype), quantized, bias)

            return compute

        recurrence = self.recurrence
        dropout = float(getattr(self, "dropout", 0.0)) if self.training else 0.0
        return recurrence.run({key: product(key) for key in recurrence.keys}, steps, dropout)

    @torch.no_grad()
    def _observe(self, input: torch.Tensor | PackedSequence, hx: Any) -> None:
        """Show every enabled observer the inputs of its product; random state stays."""
        seen: dict[str, list[torch.Tensor]] = {}
        steps = self.recurrence.enter(input, hx)
        devices = [steps.data.device] if steps.data.is_cuda else []
        with torch.random.fork_rng(devices):
            self._train_form(steps, seen)
        for name, quant in self.input_fake_quants.items():
            if quant.observer_enabled:
                show(quant, torch.cat(seen[name.removeprefix("activation_post_process_")]))

    @torch.no_grad()
    def integer_weight(self, name: str) -> torch.Tensor:
        """A weight's indices now (uint8 or int16, the weight's shape)."""
        quant, weight = self.weight_fake_quants[name], self.weights[name].detach()
        alpha = quant.clamped_alpha()
        return torch.ops.apot_fx.quantize(
            weight, alpha, quant.level_spec, quant.axis, quant.group_size
        )

    @torch.no_grad()
    def scale_and_bias(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``s`` and ``b`` of a product."""
        weight, quant = (
            f"weight_{key}",
            self.input_fake_quants.get(f"activation_post_process_{key}"),
        )
        step, bias = None if quant is None else quant.step(), getattr(self, f"bias_{key}", None)
        weight_step = self.weight_fake_quants[weight].step()
        return scale_and_bias(step, weight_step, len(self.weights[weight]), bias, None)

    def integer_products(self) -> Products:
        """The products of the integer form, by the weights and α of now."""
        products = {}
        for key in self.recurrence.keys:
            weight = self.weight_fake_quants[f"weight_{key}"]
            index = self.integer_weight(f"weight_{key}")
            levels = torch.ops.apot_fx.levels(index, weight.level_spec)
            quant = self.input_fake_quants.get(f"activation_post_process_{key}")
            grid = None if quant is None else (quant.clamped_alpha(), quant.level_spec)
            # By the weight-free bound: a look at the weights would be a data-dependent branch.
            wide = quant is not None and index.shape[1] * quant.unit * weight.unit > EXACT_SUM
            s, b = self.scale_and_bias(key)
            products[key] = IntegerProduct(levels, s, b, weight.group_size, grid, wide)
        return products

    def converted(self, low_memory: bool) -> ConvertedRecurrent:
        """Its converted form, in eval; every fake-quant must have left ``observing``."""
        return ConvertedRecurrent(self, low_memory).eval()


def _proved_sign(mode: str, key: str, signed: bool | None) -> bool | None:
    """Signedness of a product's input; None leaves it to calibration."""
    if key in ("ih", "ih_l0", "ih_l0_reverse"):
        return signed
    if mode == "RNN_RELU":
        return False if key.startswith("ih") else None  # hx may be negative
    return True


def show(quant: FakeQuantize, values: torch.Tensor) -> None:
    """Let a fake-quant observe. Zeros alone (the default state) tell no range: they only count
    until other values come, and let nothing leave ``observing``."""
    observer = quant.observer
    assert observer is not None
    telling = (values.isfinite() & (values != 0)).any()
    if not bool(largest_of_ranks(telling.int())):
        if not observer.seen:
            observer(values)
        return
    if observer.seen_only_zeros:
        observer.reset()
    quant(values)


class PreparedLSTM(PreparedRecurrent, nn.LSTM):  # type: ignore[misc]
    float_type = nn.LSTM


class PreparedGRU(PreparedRecurrent, nn.GRU):  # type: ignore[misc]
    float_type = nn.GRU


class PreparedRNN(PreparedRecurrent, nn.RNN):  # type: ignore[misc]
    float_type = nn.RNN


class PreparedLSTMCell(PreparedRecurrent, nn.LSTMCell):  # type: ignore[misc]
    float_type = nn.LSTMCell


class PreparedGRUCell(PreparedRecurrent, nn.GRUCell):  # type: ignore[misc]
    float_type = nn.GRUCell


class PreparedRNNCell(PreparedRecurrent, nn.RNNCell):  # type: ignore[misc]
    float_type = nn.RNNCell


_KINDS: tuple[type[PreparedRecurrent], ...] = (
    PreparedLSTM, PreparedGRU, PreparedRNN, PreparedLSTMCell, PreparedGRUCell, PreparedRNNCell,
)  # fmt: skip

#: Which prepared layer stands for which torch layer; exact types only.
RECURRENT: dict[type[nn.Module], type[PreparedRecurrent]] = {k.float_type: k for k in _KINDS}


class ConvertedRecurrent(ConvertedOp):
    """A recurrent layer on packed weights, called as the torch layer it came from.

    Per product: child ``weight_<product>`` (:class:`ApotTensor`), buffers ``s_<product>`` and
    ``b_<product>`` (float32) and, unless weight-only, child ``quantize_<product>``
    (:class:`Quantize`) for its input.
    """

    standalone = True
    input_spec = ""

    def __init__(self, layer: PreparedRecurrent, low_memory: bool) -> None:
        super().__init__()
        self.recurrence = layer.recurrence
        self.output_dtype = next(iter(layer.weights.values())).dtype
        self.wide: dict[str, bool] = {}
        for key in self.recurrence.keys:
            name = f"weight_{key}"
            quant, index = layer.weight_fake_quants[name], layer.integer_weight(name)
            levels = quant.known_level_set()
            weight = ApotTensor(index, quant.alpha, levels, quant.axis, quant.group_size)
            weight.keep_decoded = not low_memory
            self.add_module(name, weight)
            for letter, value in zip("sb", layer.scale_and_bias(key), strict=True):
                self.register_buffer(f"{letter}_{key}", value)
            grid = layer.input_fake_quants.get(f"activation_post_process_{key}")
            self.wide[key] = False
            if grid is not None:
                known = grid.known_level_set()
                self.add_module(f"quantize_{key}", Quantize(grid.alpha, known))
                self.wide[key] = largest_sum(weight.levels(), known) > EXACT_SUM
                weight.drop_cache()

    @property
    def weights(self) -> dict[str, ApotTensor]:
        """The packed weights, by name."""
        return {n: part for n, part in self._modules.items() if isinstance(part, ApotTensor)}

    def forward(  # type: ignore[override]
        self, input: torch.Tensor | PackedSequence, hx: Any = None
    ) -> Any:
        return self.compute(input, hx)

    def compute(self, x: torch.Tensor | PackedSequence, hx: Any = None) -> Any:
        steps = self.recurrence.enter(x, hx)
        results = run_integers(self.recurrence, self.integer_products(), steps, self.output_dtype)
        return self.recurrence.leave(x, results)

    def integer_products(self) -> Products:
        """The products, of what is stored."""
        products = {}
        for key in self.recurrence.keys:
            weight, quantizer = self._modules[f"weight_{key}"], self._modules.get(f"quantize_{key}")
            assert isinstance(weight, ApotTensor)
            s, b = self._buffers[f"s_{key}"], self._buffers[f"b_{key}"]
            assert s is not None and b is not None
            grid = (
                (quantizer.alpha, quantizer.level_spec) if isinstance(quantizer, Quantize) else None
            )
            products[key] = IntegerProduct(
                weight.levels(), s, b, weight.group_size, grid, self.wide[key]
            )
        return products

    def check_state(self, state: Mapping[str, Any]) -> None:
        for key, value in state.items():
            if key in self._buffers and not torch.isfinite(value).all():
                raise TensorError(f"{key}: holds NaN or inf; the file is damaged")

    def extra_repr(self) -> str:
        inputs = "integer" if "quantize_" in "".join(self._modules) else "float"
        return f"{self.recurrence.kind}, {inputs} activations"
