"""``explain``: one row per layer and per op on the data path."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from ..errors import ConfigError, did_you_mean
from ..fake_quant import OBSERVING, FakeQuantize
from ..graph import called_module, describe_call, value_kind
from ..levels import LevelSet
from ..nn import (
    ConvertedAttention,
    ConvertedOp,
    ConvertedRecurrent,
    ConvertedWeighted,
    PreparedLayer,
    PreparedOp,
    PreparedRecurrent,
    PreparedWeighted,
    Quantize,
    input_fake_quants,
)
from ..passes.functional_layers import constants
from ..passes.index_ops import bounds
from ..passes.opaque_call import OpaqueCall
from ..passes.stage import StageModule, as_tuple, grids_of, info
from ..passes.tree import joined, stage_info, stages, standalone
from ..table import Table
from .coverage import coverage_notes

_COLUMNS = ("name", "op", "form", "weight", "input", "why")

#: What a user can do about a reason, by how the reason begins.
_REMEDIES = {
    "the config leaves": "name it with set_module_name",
    "never called": "the example or config may leave it out",
}


def explain(model: nn.Module, node: str | None = None) -> Table:
    """Rows of every stage's calls in graph order, then of what Python code calls.

    With ``node``, of that layer or node alone. Raises ConfigError (did you mean …) where it names
    nothing.
    """
    rows = [row for path, stage in stages(model).items() for row in _stage_rows(path, stage)]
    own = "called by Python code"
    rows += [_standalone_row(path, layer, own) for path, layer in _called_by_python(model)]
    known = stage_info(model)
    assert known is not None
    shown = {row["name"] for row in rows}
    modules = dict(model.named_modules())
    left = {note.where: note.what for report in known.reports for note in report.left}
    for path, why in {**left, **known.opaque}.items():
        if path in modules and path not in shown:
            kind = type(modules[path]).__name__ if path else known.origin.__name__
            rows.append(_cells(path or "(root)", kind, "float", why=_with_remedy(why)))
    if node is not None:
        rows = _only(rows, str(node))
    title = f"{known.origin.__name__}: {known.kind}"
    return Table(_COLUMNS, rows, title=title, notes=coverage_notes(model))


def _called_by_python(model: nn.Module) -> Iterator[tuple[str, PreparedOp | ConvertedOp]]:
    """Standalone layers that no graph calls."""
    in_graphs = {
        id(called_module(stage, node))
        for stage in stages(model).values()
        for node in stage.graph.nodes
    }
    return (
        (path, layer) for path, layer in standalone(model).items() if id(layer) not in in_graphs
    )


def _stage_rows(path: str, stage: StageModule) -> Iterator[dict[str, object]]:
    reasons = {note.where: note.what for report in stage.apot.reports for note in report.left}
    weights = constants(stage)
    called = set()
    for call in stage.graph.nodes:
        is_call = call.op in ("call_module", "call_function", "call_method")
        ours = isinstance(called_module(stage, call), (PreparedOp, ConvertedOp))
        if not is_call or call in weights or (value_kind(call) == "other" and not ours):
            continue
        if call.meta.get("keep") and not info(call).reason:
            continue
        row = _row(stage, call, reasons)
        called.add(row["name"])
        yield {**row, "name": joined(path, str(row["name"]))}
    layers = dict(stage.named_modules())
    for name, why in reasons.items():
        if name in layers and name not in called:
            kind = type(layers[name]).__name__
            yield _cells(joined(path, name), kind, "float", why=_with_remedy(why))
        elif why.startswith("`if self.training`"):
            yield _cells(joined(path, name), "decision", "fixed", why=why)


def _cells(
    name: str, op: str, form: str, weight: str = "", inputs: str = "", why: str = ""
) -> dict[str, object]:
    values = (name, op, form, weight, inputs, why)
    return dict(zip(_COLUMNS, values, strict=True))


def _row(stage: StageModule, call: fx.Node, reasons: dict[str, str]) -> dict[str, object]:
    module, found = called_module(stage, call), info(call)
    name = str(call.target) if call.op == "call_module" else call.name
    if isinstance(module, FakeQuantize):
        return _cells(name, "fake-quant", module.state, inputs=_describe(module))
    if isinstance(module, Quantize):
        return _cells(name, "quantize", "index", inputs=str(module.level_set))
    if isinstance(module, (PreparedOp, ConvertedOp)) and module.standalone:
        return _standalone_row(name, module, "called as in float")
    if isinstance(module, PreparedLayer):
        return _prepared_row(stage, call, module)
    if isinstance(module, ConvertedWeighted):
        inputs = str(module.input_levels or module.float_input)
        return _cells(name, module.kind, "integer", str(module.weight.level_set), inputs)
    if isinstance(module, (PreparedOp, ConvertedOp)):
        return _operator_row(stage, call, module)
    if isinstance(module, OpaqueCall):
        called = f"{module.function.__name__.strip('_')}()"
        why = reasons.get(f"{module.function.__name__}()", "left as one call")
        return _cells(name, called, "float", why=_with_remedy(why))
    op = describe_call(stage, call)
    if found.quantizer:
        return _cells(name, op, "index", why=f"carries indices of {found.quantizer}")
    return _cells(name, op, "float", why=_why_float(stage, call, reasons))


def _describe(quant: FakeQuantize) -> str:
    sign = {None: "open", True: "signed", False: "unsigned"}[quant.signed]
    return f"{quant.spec.describe()}, {sign}"


def _standalone_row(path: str, layer: PreparedOp | ConvertedOp, own: str) -> dict[str, object]:
    """A layer that owns its quantizers; ``own``: who calls it."""
    if isinstance(layer, ConvertedWeighted):
        inputs = str(layer.input_levels or layer.float_input)
        return _cells(path, layer.kind, "integer", str(layer.weight.level_set), inputs, own)
    if isinstance(layer, ConvertedRecurrent):
        weights = {str(part.level_set) for part in layer.weights.values()}
        return _cells(path, layer.recurrence.kind, "integer", ", ".join(weights), "", own)
    assert isinstance(layer, (PreparedWeighted, PreparedRecurrent))
    quants = list(input_fake_quants(layer).values())
    inputs = _describe(quants[0]) if quants else getattr(layer, "float_input", "float")
    if any(quant.state == OBSERVING and not quant.seen for quant in quants):
        own = "saw no finite value so far: convert refuses it until it does"
    if isinstance(layer, PreparedWeighted):
        if layer.read_at:
            why = f"its weight is read at {layer.read_at} without calling it"
            return _cells(path, layer.kind, "float", why=why)
        weight = layer.weight_fake_quant.spec.describe()
    else:
        weight = next(iter(layer.weight_fake_quants.values())).spec.describe()
    return _cells(path, layer.kind, "quantized", weight, inputs, own)


def _operator_row(
    stage: StageModule, call: fx.Node, op: PreparedOp | ConvertedOp
) -> dict[str, object]:
    """An operator without a weight: what each of its inputs lies on."""
    name = str(call.target)
    if isinstance(op, ConvertedOp):
        specs = as_tuple(op.input_spec)
        levels = [str(LevelSet.parse(spec)) if spec else "float" for spec in specs]
        own = [str(op.quantize.level_set)] if isinstance(op, ConvertedAttention) else []
        return _cells(name, op.kind, "integer", inputs=_inputs(levels, own))
    quants = [stage.get_submodule(str(m.target)) for _, m in grids_of(call) if m is not None]
    grids = [_describe(quant) for quant in quants if isinstance(quant, FakeQuantize)]
    own = [_describe(quant) for quant in input_fake_quants(op).values()]
    return _cells(name, op.kind, "quantized", inputs=_inputs(grids, own))


def _inputs(grids: list[str], own: list[str]) -> str:
    return " x ".join(grids) + "".join(f"; softmax {grid}" for grid in own)


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
        return _with_remedy(reason)
    if bounds(stage, call) is not None and all(
        isinstance(called_module(stage, user), FakeQuantize) for user in call.users
    ):
        return "a clamp: becomes part of the quantizer"
    origin = info(call).origin
    return "float op" + (f" at {origin}" if origin else "")


def _with_remedy(reason: str) -> str:
    for start, remedy in _REMEDIES.items():
        if reason.startswith(start):
            return f"{reason}; {remedy}"
    return reason


def _only(rows: list[dict[str, object]], name: str) -> list[dict[str, object]]:
    chosen = [row for row in rows if row["name"] == name]
    if not chosen:
        known = [str(row["name"]) for row in rows]
        raise ConfigError(f"explain: no layer or node {name!r}.{did_you_mean(name, known)}")
    return chosen
