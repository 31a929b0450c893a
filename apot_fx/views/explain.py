"""``explain``: one row per layer and per op on the data path."""

from __future__ import annotations

from torch import fx, nn

from ..errors import ConfigError, did_you_mean
from ..fake_quant import FakeQuantize
from ..graph import called_module, describe_call, value_kind
from ..nn import ConvertedLayer, PreparedLayer, Quantize
from ..passes.functional_layers import constants
from ..passes.index_ops import bounds
from ..passes.stage import StageModule, info
from ..table import Table

_COLUMNS = ("name", "op", "form", "weight", "input", "why")


def explain(stage: StageModule, node: str | None = None) -> Table:
    """Rows of every call in graph order; with ``node``, of that layer or node alone.

    Raises ConfigError (did you mean …) where ``node`` names nothing.
    """
    reasons = {note.where: note.what for report in stage.apot.reports for note in report.left}
    weights = constants(stage)
    rows = [
        _row(stage, call, reasons)
        for call in stage.graph.nodes
        if call.op in ("call_module", "call_function", "call_method")
        and value_kind(call) != "other"
        and call not in weights
        and (info(call).reason or not call.meta.get("keep"))
    ]
    called = {row["name"] for row in rows}
    layers = dict(stage.named_modules())
    for name, why in reasons.items():
        if name in layers and name not in called:
            module = layers[name]
            rows.append(_cells(name, type(module).__name__, "float", why=why))
    if node is not None:
        rows = _only(rows, node)
    return Table(
        _COLUMNS,
        rows,
        title=f"{stage.apot.origin.__name__}: {stage.apot.kind}",
        notes=_notes(stage),
    )


def _cells(
    name: str, op: str, form: str, weight: str = "", inputs: str = "", why: str = ""
) -> dict[str, object]:
    values = (name, op, form, weight, inputs, why)
    return dict(zip(_COLUMNS, values, strict=True))


def _row(stage: StageModule, call: fx.Node, reasons: dict[str, str]) -> dict[str, object]:
    module, found = called_module(stage, call), info(call)
    name = str(call.target) if call.op == "call_module" else call.name
    if isinstance(module, FakeQuantize):
        sign = {None: "open", True: "signed", False: "unsigned"}[module.signed]
        how = f"{module.spec.describe()}, {sign}"
        return _cells(name, "fake-quant", module.state, inputs=how)
    if isinstance(module, Quantize):
        return _cells(name, "quantize", "index", inputs=str(module.level_set))
    if isinstance(module, PreparedLayer):
        return _prepared_row(stage, call, module)
    if isinstance(module, ConvertedLayer):
        inputs = "float" if module.input_levels is None else str(module.input_levels)
        return _cells(name, module.kind, "integer", str(module.weight.level_set), inputs)
    op = describe_call(stage, call)
    if found.quantizer:
        return _cells(name, op, "index", why=f"carries indices of {found.quantizer}")
    return _cells(name, op, "float", why=_why_float(stage, call, reasons))


def _prepared_row(stage: StageModule, call: fx.Node, layer: PreparedLayer) -> dict[str, object]:
    grid, norm = (*call.args[1:], None, None)[:2]
    quant = stage.get_submodule(str(grid.target)) if isinstance(grid, fx.Node) else None
    inputs = quant.spec.describe() if isinstance(quant, FakeQuantize) else "float"
    why = f"batch norm {norm.target} folded" if isinstance(norm, fx.Node) else ""
    return _cells(
        str(call.target),
        layer.kind,
        "quantized",
        layer.weight_fake_quant.spec.describe(),
        inputs,
        why,
    )


def _why_float(stage: StageModule, call: fx.Node, reasons: dict[str, str]) -> str:
    reason = info(call).reason or reasons.get(call.name) or reasons.get(str(call.target), "")
    if reason:
        return reason
    if bounds(stage, call) is not None and all(
        isinstance(called_module(stage, user), FakeQuantize) for user in call.users
    ):
        return "a clamp: becomes part of the quantizer"
    origin = info(call).origin
    return "float op" + (f" at {origin}" if origin else "")


def _notes(stage: StageModule) -> list[str]:
    layers = [m for m in stage.modules() if isinstance(m, (PreparedLayer, ConvertedLayer))]
    others = [
        m
        for m in stage.modules()
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) and not isinstance(m, PreparedLayer)
    ]
    inside = sum(layer.weight_shape.numel() for layer in layers)
    total = inside + sum(int(layer.get_parameter("weight").numel()) for layer in others)
    share = f"{100 * inside / total:.1f} %" if total else "none"
    return [f"{len(layers)} of {len(layers) + len(others)} layers quantized, {share} of weights"]


def _only(rows: list[dict[str, object]], name: str) -> list[dict[str, object]]:
    chosen = [row for row in rows if row["name"] == name]
    if not chosen:
        known = [str(row["name"]) for row in rows]
        raise ConfigError(f"explain: no layer or node {name!r}.{did_you_mean(name, known)}")
    return chosen
