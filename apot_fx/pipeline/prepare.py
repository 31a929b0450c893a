"""Prepare: capture a float model, then put observers and fake-quants into it."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

from torch import fx, nn

from ..config import QConfig, QConfigMapping
from ..errors import ModelError, TraceError
from ..graph import copy_of, substitute
from ..nn import expand_attention, prepare_standalone, restore_attention
from ..passes import prepare_passes, run_passes
from ..passes.annotate import describe_config, resolve
from ..passes.example import Call
from ..passes.purity import Attributes, put_back, restored_from
from ..passes.report import PassReport
from ..passes.stage import StageInfo, StageModule, keep_quantizers
from ..passes.tied import Groups, settle
from ..passes.tree import joined, stage_info
from ..values import same_bits, tensors_in
from .capture import Captured, capture
from .floats import in_float, outputs, with_outputs
from .intake import take_in
from .stages import require_float
from .tied import share_fake_quants, tied_layers


def prepare(
    model: nn.Module,
    config: str | QConfig | QConfigMapping,
    example_inputs: Any,
    inplace: bool,
) -> nn.Module:
    """Put observers and fake-quants into a float model."""
    mapping = QConfigMapping.of(config)
    mapping.check_quantizes()
    call = None if example_inputs is None else Call.of(example_inputs)
    model = require_float(take_in(model, call, inplace))
    if inplace:
        return _prepare_inplace(model, mapping, call)
    for in_graphs in (True, False):
        copy = copy_of(model)
        parameters = list(copy.parameters())
        with restored_from(copy, model):
            own = None if call is None else _checked(copy, call)
            if own is not None:
                put_back(parameters, model)
            prepared = _prepare(copy, mapping, own, in_graphs)
            written = put_back(parameters, model)  # through .data: then no graph can be trusted
            same = own is None or _same_in_float(prepared, model, own)
            if own is not None:
                put_back(parameters, model)
        if same and not (written and in_graphs):
            return prepared
    raise TraceError(
        f"{type(model).__name__} prepared with every quantizer off gives other bits than the "
        "model, though its code and layers are its own; please report it with the model"
    )


def _checked(model: nn.Module, call: Call) -> Call:
    """Example inputs that fit the model, with what it gives."""
    call.bound(model)
    call = with_outputs(model, call)
    if not tensors_in(call.outputs):
        kind = type(call.outputs).__name__
        raise ModelError(f"{type(model).__name__}'s forward gives no tensor but a {kind}")
    return call


def _prepare_inplace(model: nn.Module, mapping: QConfigMapping, call: Call | None) -> nn.Module:
    """Take the model itself over; on any error it is as it was."""
    call = None if call is None else _checked(model, call)
    before = Attributes(model)
    try:
        prepared = _prepare(model, mapping, call, True)
    except BaseException:
        before.restore()
        restore_attention(model)
        raise
    del before  # it holds weights, and fx leaves frames behind until garbage is collected
    return prepared


def _same_in_float(prepared: nn.Module, model: nn.Module, call: Call) -> bool:
    """Whether prepared gives the model's bits; also where the model does not give them again."""
    same = False
    with in_float(prepared), suppress(Exception):  # its code may mind what it finds inside
        same = same_bits(call.outputs, outputs(prepared, call))
    return same or not same_bits(call.outputs, outputs(copy_of(model), call))


def _prepare(
    model: nn.Module, mapping: QConfigMapping, call: Call | None, in_graphs: bool
) -> nn.Module:
    expand_attention(model)
    found = capture(model, call, in_graphs)
    owners = [model, *found.stages.values()]
    originals = {path: model.get_submodule(path) for path in found.stages}
    tied = tied_layers(model, found, mapping)
    report = _prepare_layers(found, mapping, tied, owners)
    for path, stage in found.stages.items():
        run_passes(stage, prepare_passes(mapping, path, found.ends[path], tied))
        stage.apot.kind = "prepared"
    substitute(owners, {id(originals[path]): stage for path, stage in found.stages.items()})
    if isinstance(model, fx.GraphModule) and "" not in found.stages:
        raise TraceError(f"the GraphModule can't be traced again: {found.opaque['']}")
    root = found.stages.get("") or _python_root(model)
    share_fake_quants(root)
    info = stage_info(root)
    assert info is not None
    info.opaque = found.opaque
    info.positional = 0 if call is None else len(call.args)
    info.reports.append(report)
    _check_config(found, mapping, report, type(model).__name__)
    return root


def _prepare_layers(
    found: Captured, mapping: QConfigMapping, tied: Groups, owners: list[nn.Module]
) -> PassReport:
    """Standalone layers in place of those that Python code calls."""
    report = PassReport("standalone")
    made: dict[int, nn.Module] = {}
    for path, layer in found.layers.items():
        member = resolve(mapping, path, layer, found.ends[path])
        group = tied.get(id(layer._parameters.get("weight")))
        choice = (member.config, member.reason)
        config, reason = settle(group).get(path, choice) if group else choice
        if reason or config is None:
            report.leave(path, reason)
            continue
        made[id(layer)] = prepare_standalone(layer, config, path)
        report.change(path, f"{describe_config(config)}, called by Python code")
    for path, why in found.read.items():
        report.leave(path, why)
    substitute(owners, made)
    return report


def _python_root(model: nn.Module) -> nn.Module:
    """The user's own module as root of a prepared model."""
    model.__dict__["apot"] = StageInfo("prepared", type(model))
    model._register_load_state_dict_pre_hook(keep_quantizers, with_module=True)
    return model


def _check_config(found: Captured, mapping: QConfigMapping, report: PassReport, model: str) -> None:
    """Every name of the mapping is a layer's (ConfigError); say so where it quantizes nothing."""
    names, left, quantized = [], [], False
    for path, one in [("", report), *((path, _annotated(s)) for path, s in found.stages.items())]:
        names += [joined(path, note.where) for note in (*one.changed, *one.left)]
        left += [(joined(path, note.where), note.what) for note in one.left]
        quantized = quantized or bool(one.changed)
    mapping.check_names(names)
    if not quantized:
        some = "; ".join(f"{name}: {why}" for name, why in left[:3]) or "no layer with weights"
        warnings.warn(
            f"nothing of {model} is quantized ({some}{'; …' if len(left) > 3 else ''}); "
            "choose another preset, or name layers with QConfigMapping.set_module_name",
            stacklevel=5,
        )


def _annotated(stage: StageModule) -> PassReport:
    return next(report for report in stage.apot.reports if report.name == "annotate")
