"""``AdaptiveRoundingOptimizer``: AdaRound of a float model's weights, layer by layer, uniform."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from ..errors import CalibrationError, CompatError, ConfigError
from .adaround_fake_quantize import AdaroundFakeQuantizer, SymmetricMinMaxObserver
from .adaround_loss import AdaptiveRoundingLoss

Hook = Callable[[nn.Module, Any, Any], Any]
_LAYERS = (nn.Conv1d, nn.Linear, nn.Conv2d)


class AdaptiveRoundingOptimizer:
    """Learn for each weight of a Linear, Conv1d or Conv2d whether it is rounded down or up.

    A layer is fitted on the input that it gets behind rounded layers, towards its float output.
    For any level set, in a prepared model, :mod:`apot_fx.ptq` does this.

    Args:
        model: a float model; left as it is.
        callback: ``callback(model, batch, feed_forward_wrapper)`` runs one batch; it may leave out
            the last parameter.
        forward_hook_wrapper: ``forward_hook_wrapper(fetched)`` gives a forward hook that appends a
            layer's input, then its output, to the list ``fetched``.
        data: a sequence of batches, or what else has a length and can be read again and again.
        observer, dtype, quant_min, quant_max, qscheme: of :class:`AdaroundFakeQuantizer`.
        max_iter: steps per layer; with 0 weights go to their nearest levels.
        batch_size: samples per step.
        feed_forward_wrapper: given to ``callback``.

    Raises CalibrationError for no data, data without a length, or a layer that gets or gives NaN or
    inf; ConfigError for max_iter or batch_size out of range; CompatError for a layer that computes
    its weight (weight_norm, a parametrization).

    >>> _ = torch.manual_seed(0)
    >>> def hook_into(fetched):
    ...     def hook(module, inputs, output):
    ...         fetched.extend((inputs[0].detach(), output.detach()))
    ...     return hook
    >>> model, data = nn.Sequential(nn.Linear(4, 4)), [torch.rand(8, 4) for _ in range(4)]
    >>> rounded = AdaptiveRoundingOptimizer(
    ...     model, lambda model, batch: model(batch), hook_into, data, max_iter=20, quant_min=-2,
    ...     quant_max=1).run_adaround()
    >>> len(rounded[0].weight.unique()) <= 4
    True
    """

    def __init__(
        self,
        model: nn.Module,
        callback: Callable[..., Any],
        forward_hook_wrapper: Callable[[list[Tensor]], Hook],
        data: Sequence[Any],
        observer: Callable[..., Any] = SymmetricMinMaxObserver,
        max_iter: int = 10000,
        dtype: torch.dtype = torch.qint8,
        quant_min: int = -128,
        quant_max: int = 127,
        qscheme: torch.qscheme = torch.per_tensor_symmetric,
        batch_size: int = 256,
        feed_forward_wrapper: nn.Module | None = None,
    ) -> None:
        _check(model, data, max_iter, batch_size)
        with torch.inference_mode(False):
            self.model, self.q_model = model, copy.deepcopy(model)
        self.callback, self.forward_hook_wrapper = callback, forward_hook_wrapper
        self.data, self.max_iter, self.batch_size = data, max_iter, batch_size
        self.feed_forward_wrapper = feed_forward_wrapper
        self.adaptive_round_loss_fn = AdaptiveRoundingLoss(max_iter=max_iter, warm_start=0.2)
        self._make_quantizer = AdaroundFakeQuantizer.with_args(
            dtype=dtype, observer=observer, qscheme=qscheme,
            quant_min=quant_min, quant_max=quant_max, reduce_range=False,
        )  # fmt: skip

    def run_adaround(self) -> nn.Module:
        """A copy of the model whose weights are rounded, every layer's scale in its
        ``weight_fake_quant`` (the observer). Layers that no batch reaches keep their weights; a
        layer whose weight is an earlier one's has its rounding and observer, too."""
        pairs = zip(self.model.named_modules(), self.q_model.modules(), strict=True)
        layers = [(name, mine, its) for (name, mine), its in pairs if isinstance(mine, _LAYERS)]
        observers: dict[int, nn.Module] = {}
        with _at_rest(self.model), _at_rest(self.q_model), torch.inference_mode(False):
            for name, module, q_module in layers:
                tied = id(q_module.weight)
                if tied in observers:
                    q_module.weight_fake_quant = observers[tied]
                    continue
                self.optimize_adaptive_rounding(module, q_module, name)
                if hasattr(q_module, "weight_fake_quant"):
                    observers[tied] = q_module.weight_fake_quant  # type: ignore[assignment]
        return self.q_model

    @torch.no_grad()
    def get_data_inp_out(
        self, module: nn.Module, q_module: nn.Module, data: Sequence[Any]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per batch: the rounded model's input to the layer, its float output and float input."""
        fetched: list[Tensor] = []
        q_fetched: list[Tensor] = []
        hooks = [
            module.register_forward_hook(self.forward_hook_wrapper(fetched)),
            q_module.register_forward_hook(self.forward_hook_wrapper(q_fetched)),
        ]
        try:
            for batch in data:
                self._run(self.model, batch)
                self._run(self.q_model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return q_fetched[::2], fetched[1::2], fetched[::2]

    def _run(self, model: nn.Module, batch: Any) -> None:
        arguments = (model, batch, self.feed_forward_wrapper)
        try:
            inspect.signature(self.callback).bind(*arguments)
        except (TypeError, ValueError):
            arguments = arguments[:2]  # type: ignore[assignment]
        self.callback(*arguments)

    def optimize_adaptive_rounding(
        self, module: nn.Module, q_module: nn.Module, name: str = ""
    ) -> None:
        """Fit one layer and write its rounded weight; ``name`` labels the progress bar."""
        inputs, outputs, _ = self.get_data_inp_out(module, q_module, self.data)
        if not inputs:
            return
        x, wanted = torch.cat(inputs), torch.cat(outputs)
        if not bool(x.isfinite().all() and wanted.isfinite().all()):
            raise CalibrationError(
                f"AdaptiveRoundingOptimizer: {name or 'the layer'} gets or gives NaN or inf; drop "
                "such batches, or repair the weights"
            )
        weight = q_module.weight.detach()  # type: ignore[union-attr, operator]
        quantizer = self._make_quantizer().to(weight.device)
        quantizer(weight)
        quantizer.disable_observer()
        optimizer = torch.optim.Adam([quantizer.V])
        steps = tqdm(range(self.max_iter), desc=f"adaround {name}", disable=None, leave=False)
        for step in steps:
            rows = torch.randint(len(x), (min(self.batch_size, len(x)),)).to(x.device)
            optimizer.zero_grad()
            with torch.enable_grad():
                out = functional_call(q_module, {"weight": quantizer(weight)}, (x[rows],))
                terms = self.adaptive_round_loss_fn(out, wanted[rows], quantizer.V, curr_iter=step)
                (terms[0] + terms[1]).backward(inputs=[quantizer.V])
            optimizer.step()
        quantizer.use_soft_rounding = False
        with torch.no_grad():
            weight.copy_(quantizer(weight))
        q_module.weight_fake_quant = quantizer.activation_post_process


def _check(model: nn.Module, data: Any, max_iter: int, batch_size: int) -> None:
    """Everything that is refused, before anything is copied."""
    for layer, module in model.named_modules():
        if isinstance(module, _LAYERS) and "weight" not in module._parameters:
            raise CompatError(
                f"AdaptiveRoundingOptimizer: {layer} computes its weight, so that a rounded one "
                "can't be written; remove its parametrization (weight_norm) first"
            )
    if not hasattr(data, "__len__"):
        raise CalibrationError(
            f"AdaptiveRoundingOptimizer: data is a {type(data).__name__}, but it is read anew for "
            "every layer; pass a list of batches"
        )
    if not len(data):
        raise CalibrationError("AdaptiveRoundingOptimizer: data is empty; pass batches")
    for name, value, least in (("max_iter", max_iter, 0), ("batch_size", batch_size, 1)):
        if value < least:
            raise ConfigError(
                f"AdaptiveRoundingOptimizer: {name} is {value}; {least} or more is wanted"
            )


@contextlib.contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """In eval, so that running leaves the model as it is, and with no activation that overwrites
    the output of the layer before it, which a hook may have kept."""
    modes = [(module, module.training) for module in model.modules()]
    inplace = [module for module, _ in modes if getattr(module, "inplace", False) is True]
    model.eval()
    for module in inplace:
        module.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in inplace:
            module.inplace = True  # type: ignore[assignment]
