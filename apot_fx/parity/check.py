"""``check``: the whole comparison of a prepared model with its converted one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ..batches import Forward, check_batches, evaluating, run_batch
from ..errors import CalibrationError, StageError
from ..fake_quant import FakeQuantize
from ..graph import called_module
from ..nn import ConvertedOp, PreparedLayer, PreparedOp, Quantize
from ..passes.purity import unchanged
from ..passes.stage import StageModule, info
from ..passes.tree import joined, stage_info, stages, standalone
from ..values import same_bits, tensor_pairs, unequal
from .record import NodeFailure, Site, recording, seed
from .stored import compare_stored, ulp_distance
from .verdict import Finding, Verdict

#: Provenance of a value: path of the stage or layer, id of the node.
Place = tuple[str, int | None]


def check(
    prepared: nn.Module,
    converted: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None,
    convert: Callable[[nn.Module], nn.Module],
) -> Verdict:
    """Compare stored tensors, then the values of every batch.

    ``convert`` makes the expected converted model from prepared. Raises StageError where the two
    do not belong together and CalibrationError where no batch, or an unusable one, comes.
    """
    _belong_together(prepared, converted)
    verdict = Verdict()
    verdict.stored.extend(compare_stored(convert(prepared), converted))
    comparison = _Comparison(prepared, converted, verdict)
    known = stage_info(prepared)
    call = forward or (known and known.forward) or run_batch
    count = 0
    with evaluating(prepared, converted), _observers_off(prepared):
        for batch in check_batches(batches):
            comparison.run(call, batch, count)
            count += 1
    if not count:
        raise CalibrationError("check_parity got no batch; pass at least one")
    comparison.finish()
    return verdict


def _belong_together(prepared: nn.Module, converted: nn.Module) -> None:
    mine, theirs = (_quantized_layers(model) for model in (prepared, converted))
    first, second = (known.origin for m in (prepared, converted) if (known := stage_info(m)))
    if mine != theirs or first is not second:
        odd = sorted(mine ^ theirs)
        what = (
            f"layer {odd[0]!r} is quantized in only one of them"
            if odd
            else f"{first.__name__} and {second.__name__}"
        )
        raise StageError(
            f"check_parity: the stages do not belong together ({what}); pass a prepared model and "
            "what convert_apot made of it"
        )


def _quantized_layers(model: nn.Module) -> set[str]:
    alone = standalone(model).items()
    return {path for path, layer in alone if not getattr(layer, "read_at", "")} | {
        joined(path, info(node).layer)
        for path, stage in stages(model).items()
        for node in stage.graph.nodes
        if _is(stage, node, PreparedOp) or _is(stage, node, ConvertedOp)
    }


def _is(stage: StageModule, node: fx.Node, kind: type) -> bool:
    return isinstance(called_module(stage, node), kind)


@contextmanager
def _observers_off(prepared: nn.Module) -> Iterator[None]:
    """An enabled observer would move α while both stages are compared."""
    quants = [m for m in prepared.modules() if isinstance(m, FakeQuantize)]
    before = [quant.observer_enabled for quant in quants]
    try:
        for quant in quants:
            quant.observer_enabled = False
        yield
    finally:
        for quant, enabled in zip(quants, before, strict=True):
            quant.observer_enabled = enabled


class _Comparison:
    """Findings per provenance, filled batch by batch."""

    def __init__(self, prepared: nn.Module, converted: nn.Module, verdict: Verdict) -> None:
        self.prepared, self.converted, self.verdict = prepared, converted, verdict
        self.findings: dict[Place, Finding] = {}
        self.unstable: dict[Place, str] = {}
        self.failure: Finding | None = None

    def run(self, call: Forward, batch: Any, number: int) -> None:
        """Prepared twice, then converted, each value compared as it comes."""
        values: dict[tuple[Place, int], Any] = {}

        def keep(site: Site, value: Any) -> None:
            values[site.place, site.turn] = _copy(value) if _is_pinned(site, value) else value

        def again(site: Site, value: Any) -> None:
            first = values.get((site.place, site.turn))
            if not same_bits(first, value):
                self.unstable.setdefault(site.place, site.name)

        def compare(site: Site, value: Any) -> None:
            if (site.place, site.turn) in values:
                self._compare(site, values[site.place, site.turn], value)

        with _looking(self.prepared, self.verdict):
            self._call(self.prepared, keep, call, batch, number)
        self._call(self.prepared, again, call, batch, number)
        if self.failure is None:
            self._call(self.converted, compare, call, batch, number)

    def _call(self, model: nn.Module, watch: Any, call: Forward, batch: Any, number: int) -> None:
        try:
            with unchanged(model), recording(model, watch):
                seed(number)
                call(model, batch)
        except NodeFailure as problem:
            if model is self.prepared:
                raise CalibrationError(
                    f"batch {number} does not run through prepared: {problem.site.name}: "
                    f"{problem.what}"
                ) from problem.__cause__
            self._fail(self._finding(problem.site), problem.what)
        except CalibrationError as problem:
            raise CalibrationError(f"batch {number}: {problem}") from None
        except Exception as problem:  # of the user's Python code between stages
            what = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
            if model is self.prepared:
                raise CalibrationError(
                    f"batch {number} does not run through prepared: {what}"
                ) from problem
            self._fail(Finding("forward", "the model's own code"), what)

    def _fail(self, finding: Finding, what: str) -> None:
        finding.problem = f"fails with {what}"
        self.failure = finding

    def _finding(self, site: Site) -> Finding:
        kind = f"indices of {site.quantizer}" if site.quantizer else "float values"
        return self.findings.setdefault(site.place, Finding(site.name, kind, site.layer))

    def _compare(self, site: Site, mine: Any, theirs: Any) -> None:
        pairs = list(tensor_pairs(mine, theirs))
        if not pairs:
            return
        finding = self._finding(site)
        quantizer = self.converted.get_submodule(site.quantizer) if site.quantizer else None
        for first, second in pairs:
            _compare_values(finding, first, second, quantizer)

    def finish(self) -> None:
        findings, failed = dict(self.findings), self.failure
        for path, stage in stages(self.converted).items():
            for node in stage.graph.nodes:
                found = findings.pop((path, info(node).id), None)
                if found is not None:
                    self.verdict.nodes.append(found)
        self.verdict.nodes.extend(findings.values())
        if failed is not None and not any(found is failed for found in self.verdict.nodes):
            self.verdict.nodes.append(failed)
        self.verdict.unstable.extend(self.unstable.values())
        self.verdict.uncovered.extend(dict.fromkeys(self._uncovered()))

    def _uncovered(self) -> Iterator[str]:
        for path, stage in stages(self.converted).items():
            for node in stage.graph.nodes:
                layer = called_module(stage, node)
                quantized = isinstance(layer, ConvertedOp) and not layer.standalone
                if quantized and not self._is_covered(path, stage, node):
                    yield joined(path, info(node).layer)
        for path in standalone(self.converted):
            if not self._has_values((path, None)):
                yield path

    def _has_values(self, place: Place) -> bool:
        finding = self.findings.get(place)
        return finding is not None and finding.values > 0

    def _is_covered(self, path: str, stage: StageModule, node: fx.Node) -> bool:
        """Whether its values, or what index ops made of them, were compared."""
        pending = [node]
        while pending:
            current = pending.pop()
            if self._has_values((path, info(current).id)):
                return True
            pending.extend(
                user
                for user in current.users
                if user.target is operator.getitem
                or info(user).layer == info(node).layer
                or (info(user).quantizer and not _is(stage, user, ConvertedOp))
            )
        return False


@contextmanager
def _looking(prepared: nn.Module, verdict: Verdict) -> Iterator[None]:
    """Count NaN inputs of quantizers, and note how far train forms are from integer forms."""
    handles = []

    def count_nan(module: nn.Module, args: tuple[Any, ...]) -> None:
        verdict.nan_inputs += int(args[0].isnan().sum())

    def measure(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            apart = module.distance_of_forms(*args, **kwargs)
            verdict.train_form[name] = max(verdict.train_form.get(name, 0.0), apart)

        return hook

    for name, module in prepared.named_modules():
        if isinstance(module, FakeQuantize) and module.observer is not None:
            handles.append(module.register_forward_pre_hook(count_nan))
        elif isinstance(module, PreparedLayer):
            hook = measure(name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_pinned(site: Site, value: Any) -> bool:
    """Whether later code may write into the value."""
    pinned = site.node is None or bool(site.node.meta.get("pinned"))
    return pinned and isinstance(value, torch.Tensor)


def _copy(value: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, overlapping ones too."""
    if value.layout is not torch.strided:
        return value.clone()
    storage = value.untyped_storage().clone()
    return value.new_empty(0).set_(storage, value.storage_offset(), value.shape, value.stride())


def _strides(value: torch.Tensor) -> tuple[int, ...]:
    return value.stride() if value.layout is torch.strided else ()


def _compare_values(
    finding: Finding, mine: torch.Tensor, theirs: torch.Tensor, quantizer: Any
) -> None:
    index = theirs
    if isinstance(quantizer, Quantize):
        if theirs.is_floating_point():
            finding.problem = "is float where indices are expected"
            return
        theirs = quantizer.dequantize(theirs, mine.dtype)
    elif _strides(mine) != _strides(theirs) and mine.numel():
        finding.problem = f"strides {theirs.stride()}, expected {mine.stride()}"
        return
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        finding.problem = (
            f"{tuple(theirs.shape)} {theirs.dtype}, expected {tuple(mine.shape)} {mine.dtype}"
        )
        return
    differ = unequal(mine, theirs)
    finding.values += mine.numel()
    finding.differing += int(differ.sum())
    if not differ.any() or mine.dtype != torch.float32:
        return
    finding.ulp = max(finding.ulp, ulp_distance(mine, theirs))
    if isinstance(quantizer, Quantize):
        steps = (quantizer(mine).long() - index.long()).abs().max()
        finding.steps = max(finding.steps, int(steps))
