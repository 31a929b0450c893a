"""The public verbs (re-exports and composition only)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

from . import parity, pipeline, views
from . import ptq as ptq
from . import qat as qat
from .batches import Forward
from .config import ActivationSpec, QConfig, QConfigMapping, WeightSpec, presets
from .errors import ApotError, StageError
from .fake_quant import (
    FakeQuantize,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    freeze,
)
from .kernels import dequantize, fake_quantize, pack, quantize, unpack
from .levels import LevelSet
from .parity import Verdict
from .passes import ApotTracer
from .passes.stage import StageModule
from .passes.tree import stage_info
from .pipeline import require_stage
from .table import Table
from .tensor import ApotTensor

__all__ = [
    "ActivationSpec",
    "ApotError",
    "ApotTensor",
    "ApotTracer",
    "FakeQuantize",
    "LevelSet",
    "QConfig",
    "QConfigMapping",
    "StageModule",
    "Table",
    "Verdict",
    "WeightSpec",
    "calibrate",
    "check_parity",
    "convert_apot",
    "dequantize",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "explain",
    "fake_quantize",
    "freeze",
    "merge_observers",
    "pack",
    "prepare_apot",
    "presets",
    "quantize",
    "summary",
    "unpack",
]


def prepare_apot(
    model: nn.Module,
    config: str | QConfig | QConfigMapping = "w4a4",
    example_inputs: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """Put APoT observers and fake-quants into a model's graph.

    One prepared form serves post-training quantization (``calibrate``) and training
    (``prepared.train()`` and an ordinary loop; every α is a Parameter). It starts in the model's
    mode, and the model's own state_dict keys stay, so float checkpoints load with ``strict=True``.

    Args:
        model: a float model; left as it is unless ``inplace``. Also a GraphModule, and what
            ``torch.export.export(…).module()`` gives: layers, batch norm and dropout live again
            under their old names, and it starts in eval. Of torch.compile's module the model
            inside is prepared.
        config: a preset's name (``presets()`` lists them), a QConfig for every layer, or a mapping.
        example_inputs: one batch (tensor, tuple or dict). Optional arguments it passes stay inputs;
            those it leaves out are fixed at their default.
        inplace: take the model's modules over instead of copying them.

    Raises:
        ConfigError: unknown preset or layer name.
        TensorError: a weight to quantize holds NaN or inf.
        TraceError: the model's own forward can't be followed.
        StageError: ``model`` is prepared or converted already, an ExportedProgram (pass its
            ``.module()``) or a ScriptModule.

    >>> from torch import nn
    >>> prepared = prepare_apot(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> type(prepared.activation_post_process_0).__name__
    'FakeQuantize'
    """
    with torch.inference_mode(False):  # what is made here must be able to learn
        return pipeline.prepare(model, config, example_inputs, inplace)


def calibrate(
    prepared: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    progress: bool = True,
) -> None:
    """Show data to the observers, then fix signs and α (state ``frozen``).

    Runs in eval without gradients; modes and random state are restored. Calibrating again starts
    afresh, except for α that training has learned. On any error nothing is changed. Under
    ``torch.distributed`` every rank calls it with as many batches of its own; statistics and α
    then are the same on all, as of the joined batches in one process.

    Args:
        prepared: what ``prepare_apot`` gave.
        batches: an iterable of batches: tensor → ``m(x)``, dict → ``m(**d)``, tuple → ``m(*t)``,
            of a longer tuple only the required parameters.
        forward: ``forward(model, batch)`` runs one batch instead; ``check_parity`` reuses it.
        progress: show a progress bar on a terminal.

    Raises:
        CalibrationError: no batch at all, one that the model does not take, or ranks with
            different numbers of batches.
        StageError: not a prepared model.

    >>> import torch
    >>> from torch import nn
    >>> prepared = prepare_apot(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> calibrate(prepared, [torch.randn(4, 8)])
    >>> prepared.activation_post_process_0.state
    'frozen'
    """
    pipeline.calibrate(require_stage(prepared, "prepared", "calibrate"), batches, forward, progress)


def merge_observers(prepared: nn.Module, others: Iterable[nn.Module]) -> None:
    """Join what copies of one prepared model observed, each on its own shard of the data.

    ``prepared`` then has the statistics, signs and α that calibration on all the data would have
    given, bit for bit, whatever the order and grouping, and is ``frozen``; what no copy ran stays
    ``observing``. Copies may be calibrated, or observed by a loop of your own. Under
    ``torch.distributed`` ``calibrate`` joins all by itself and nothing is left to merge.

    Args:
        prepared: a prepared model; changed, but not on any error.
        others: copies of it (deepcopy, or loaded in another process); left as they are.

    Raises:
        CalibrationError: an observer that can't be merged (the presets' moving average depends on
            the order of batches), or an α that learns already; the fake-quant is named.
        StageError: not prepared models, or no copies of one another.

    >>> import copy, torch
    >>> from torch import nn
    >>> config = QConfig(WeightSpec(), ActivationSpec(observer="mse"))
    >>> prepared = prepare_apot(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), config)
    >>> other, whole = copy.deepcopy(prepared), copy.deepcopy(prepared)
    >>> shards = [torch.randn(4, 8), torch.randn(4, 8)]
    >>> calibrate(prepared, shards[:1]), calibrate(other, shards[1:]), calibrate(whole, shards)
    (None, None, None)
    >>> merge_observers(prepared, [other])
    >>> name = "activation_post_process_0"
    >>> torch.equal(prepared.get_submodule(name).alpha, whole.get_submodule(name).alpha)
    True
    """
    if isinstance(others, nn.Module):
        raise StageError("merge_observers: others is one model; pass [other]")
    stages = [require_stage(other, "prepared", "merge_observers") for other in others]
    pipeline.merge_observers(require_stage(prepared, "prepared", "merge_observers"), stages)


def convert_apot(
    prepared: nn.Module,
    backend: Literal["auto", "reference"] = "auto",
    low_memory: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Lower a calibrated or trained model to packed indices; bit for bit what prepared computes.

    Args:
        prepared: what ``prepare_apot`` gave, calibrated or trained; changed only if ``inplace``.
        backend: who computes: ``"reference"`` (plain torch); ``"auto"`` takes the fastest there is.
        low_memory: decode weights in every forward instead of keeping them decoded.
        inplace: take modules over; every float weight is freed as it is packed, also from modules
            that you still hold.

    Raises:
        CalibrationError: a fake-quant still observes, or a layer never ran (all are named).
        StageError: not a prepared model.
        TensorError: a weight or an α holds NaN or inf.

    >>> import torch
    >>> from torch import nn
    >>> prepared = prepare_apot(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> x = torch.randn(4, 8)
    >>> calibrate(prepared, [x])
    >>> converted = convert_apot(prepared)
    >>> torch.equal(prepared.eval()(x), converted(x))
    True
    """
    stage = require_stage(prepared, "prepared", "convert_apot")
    with torch.inference_mode(False):
        return pipeline.convert(stage, backend, low_memory, inplace)


def check_parity(
    prepared: nn.Module,
    converted: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
) -> Verdict:
    """Compare a prepared model (in eval) with its converted one, bit by bit.

    Recomputes every stored tensor, then runs both node by node and compares the values at every
    node that both have. See :class:`~apot_fx.parity.verdict.Verdict`.

    Args:
        prepared, converted: the two stages; both are left as they are.
        batches: as for ``calibrate``.
        forward: as for ``calibrate``; by default the one that ``calibrate`` was given.

    Raises:
        StageError: the stages do not belong together.
        CalibrationError: no batch, or one that the model does not take.

    >>> import torch
    >>> from torch import nn
    >>> prepared = prepare_apot(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> x = torch.randn(4, 8)
    >>> calibrate(prepared, [x])
    >>> check_parity(prepared, convert_apot(prepared), [x]).status
    'bit-exact'
    """

    def expected(stage: nn.Module) -> nn.Module:
        return pipeline.convert(stage, "reference", low_memory=True, inplace=False)

    return parity.check(
        require_stage(prepared, "prepared", "check_parity"),
        require_stage(converted, "converted", "check_parity"),
        batches,
        forward,
        expected,
    )


def explain(stage: nn.Module, node: str | None = None) -> Table:
    """How every layer and op is treated: quantized how, carried as indices, or float and why.

    Args:
        stage: a prepared or converted model.
        node: a layer's or node's name, for that one alone.

    Raises ConfigError where ``node`` names nothing, StageError for a float model.

    >>> from torch import nn
    >>> prepared = prepare_apot(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> [row["form"] for row in explain(prepared).rows]
    ['observing', 'quantized', 'float', 'observing', 'quantized']
    """
    return views.explain(_any_stage(stage, "explain"), node)


def summary(stage: nn.Module) -> Table:
    """Level sets, bits and bytes of every quantized layer of a prepared or converted model.

    Raises StageError for a float model.

    >>> from torch import nn
    >>> prepared = prepare_apot(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)))
    >>> [row["bits"] for row in summary(prepared).rows]
    [8, 8]
    """
    return views.summary(_any_stage(stage, "summary"))


def _any_stage(stage: nn.Module, verb: str) -> nn.Module:
    known = isinstance(stage, nn.Module) and stage_info(stage) is not None
    return stage if known else require_stage(stage, "prepared", verb)
