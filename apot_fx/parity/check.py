"""``check``: the whole comparison of a prepared stage with its converted one."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ..batches import Forward, check_batches, evaluating, run_batch
from ..errors import CalibrationError, StageError
from ..fake_quant import FakeQuantize
from ..graph import called_module
from ..nn import ConvertedOp, PreparedLayer, PreparedOp, Quantize
from ..passes.stage import NodeInfo, StageModule, info
from .record import NodeFailure, recording
from .stored import as_integers, compare_stored, ulp_distance
from .verdict import Finding, Verdict


def check(
    prepared: StageModule,
    converted: StageModule,
    batches: Iterable[Any],
    forward: Forward | None,
    convert: Callable[[StageModule], StageModule],
) -> Verdict:
    """Compare stored tensors, then the values of every batch.

    ``convert`` makes the expected converted stage from prepared. Raises StageError where the two
    do not belong together and CalibrationError where no batch, or an unusable one, comes.
    """
    _belong_together(prepared, converted)
    verdict = Verdict()
    verdict.stored.extend(compare_stored(convert(prepared), converted))
    comparison = _Comparison(prepared, converted, verdict)
    call = forward or prepared.apot.forward or run_batch
    count = 0
    with evaluating(prepared, converted), _observers_off(prepared):
        for batch in check_batches(batches):
            comparison.run(call, batch, count)
            count += 1
    if not count:
        raise CalibrationError("check_parity got no batch; pass at least one")
    comparison.finish()
    return verdict


def _belong_together(prepared: StageModule, converted: StageModule) -> None:
    mine = {info(n).layer for n in prepared.graph.nodes if _is(prepared, n, PreparedOp)}
    theirs = {info(n).layer for n in converted.graph.nodes if _is(converted, n, ConvertedOp)}
    same_class = prepared.apot.origin is converted.apot.origin
    if mine != theirs or not same_class:
        odd = sorted(mine ^ theirs)
        what = (
            f"layer {odd[0]!r} is quantized in only one of them"
            if odd
            else (f"{prepared.apot.origin.__name__} and {converted.apot.origin.__name__}")
        )
        raise StageError(
            f"check_parity: the stages do not belong together ({what}); pass a prepared model and "
            "what convert_apot made of it"
        )


def _is(stage: StageModule, node: fx.Node, kind: type) -> bool:
    return isinstance(called_module(stage, node), kind)


@contextmanager
def _observers_off(prepared: StageModule) -> Iterator[None]:
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

    def __init__(self, prepared: StageModule, converted: StageModule, verdict: Verdict) -> None:
        self.prepared, self.converted, self.verdict = prepared, converted, verdict
        self.findings: dict[int, Finding] = {}
        self.unstable: dict[int, str] = {}
        self.failed = False

    def run(self, call: Forward, batch: Any, number: int) -> None:
        """Prepared twice, then converted, each value compared as it comes."""
        values: dict[int, Any] = {}

        def keep(node: fx.Node, found: NodeInfo, args: tuple[Any, ...], value: Any) -> None:
            assert found.id is not None
            values[found.id] = value.clone() if _is_pinned(node, value) else value
            self._observe(node, found, args)

        def again(node: fx.Node, found: NodeInfo, args: tuple[Any, ...], value: Any) -> None:
            assert found.id is not None
            if not _same(values[found.id], value):
                self.unstable.setdefault(found.id, node.name)

        def compare(node: fx.Node, found: NodeInfo, args: tuple[Any, ...], value: Any) -> None:
            assert found.id is not None
            if found.id in values:
                self._compare(node, found, values[found.id], value)

        self._call(self.prepared, keep, call, batch, number)
        self._call(self.prepared, again, call, batch, number)
        if not self.failed:
            self._call(self.converted, compare, call, batch, number)

    def _call(self, stage: StageModule, watch: Any, call: Forward, batch: Any, number: int) -> None:
        try:
            with recording(stage, watch):
                call(stage, batch)
        except NodeFailure as problem:
            if stage is self.prepared:
                raise CalibrationError(
                    f"batch {number} does not run through prepared: {problem.node.name}: "
                    f"{problem.what}"
                ) from problem.__cause__
            finding = self._finding(problem.node, info(problem.node))
            finding.problem = f"fails with {problem.what}"
            self.failed = True
        except CalibrationError as problem:
            raise CalibrationError(f"batch {number}: {problem}") from None

    def _finding(self, node: fx.Node, found: NodeInfo) -> Finding:
        kind = f"indices of {found.quantizer}" if found.quantizer else "float values"
        number = -1 if found.id is None else found.id
        return self.findings.setdefault(number, Finding(node.name, kind, found.layer))

    def _compare(self, node: fx.Node, found: NodeInfo, mine: Any, theirs: Any) -> None:
        pairs = list(_tensor_pairs(mine, theirs))
        if not pairs:
            return
        finding = self._finding(node, found)
        quantizer = self.converted.get_submodule(found.quantizer) if found.quantizer else None
        for first, second in pairs:
            _compare_values(finding, first, second, quantizer)

    def _observe(self, node: fx.Node, found: NodeInfo, args: tuple[Any, ...]) -> None:
        """Count NaN inputs, and note how far the train form is from the integer form."""
        module = called_module(self.prepared, node)
        if isinstance(module, FakeQuantize):
            self.verdict.nan_inputs += int(args[0].isnan().sum())
        elif isinstance(module, PreparedLayer):
            apart = module.distance_of_forms(*args)
            before = self.verdict.train_form.get(found.layer, 0.0)
            self.verdict.train_form[found.layer] = max(before, apart)

    def finish(self) -> None:
        order = [info(node).id for node in self.converted.graph.nodes]
        self.verdict.nodes.extend(
            self.findings[number] for number in order if number in self.findings
        )
        if -1 in self.findings:
            self.verdict.nodes.append(self.findings[-1])
        self.verdict.unstable.extend(self.unstable.values())
        for node in self.converted.graph.nodes:
            layer = info(node).layer
            quantized = isinstance(called_module(self.converted, node), ConvertedOp)
            if quantized and not self._is_covered(node) and layer not in self.verdict.uncovered:
                self.verdict.uncovered.append(layer)

    def _is_covered(self, node: fx.Node) -> bool:
        """Whether its values, or what index ops made of them, were compared."""
        pending = [node]
        while pending:
            current = pending.pop()
            number = info(current).id
            finding = None if number is None else self.findings.get(number)
            if finding is not None and finding.values:
                return True
            pending.extend(
                user
                for user in current.users
                if user.target is operator.getitem
                or info(user).layer == info(node).layer
                or (info(user).quantizer and not _is(self.converted, user, ConvertedOp))
            )
        return False


def _is_pinned(node: fx.Node, value: Any) -> bool:
    """Whether a later node may write into the value."""
    return bool(node.meta.get("pinned")) and isinstance(value, torch.Tensor)


def _tensor_pairs(mine: Any, theirs: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tensors at the same place of two values (nested tuples, lists and dicts)."""
    if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        yield mine, theirs
    elif isinstance(mine, (tuple, list)) and isinstance(theirs, (tuple, list)):
        for first, second in zip(mine, theirs, strict=False):
            yield from _tensor_pairs(first, second)
    elif isinstance(mine, dict) and isinstance(theirs, dict):
        for key in mine:
            if key in theirs:
                yield from _tensor_pairs(mine[key], theirs[key])


def _same(mine: Any, theirs: Any) -> bool:
    return all(
        first.shape == second.shape and not _unequal(first, second).any()
        for first, second in _tensor_pairs(mine, theirs)
    )


def _unequal(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one dtype differ in bits; any two NaNs are equal."""
    unequal = as_integers(first) != as_integers(second)
    if first.is_floating_point():
        unequal = unequal & ~(first.isnan() & second.isnan())
    return unequal


def _compare_values(
    finding: Finding, mine: torch.Tensor, theirs: torch.Tensor, quantizer: Any
) -> None:
    index = theirs
    if isinstance(quantizer, Quantize):
        if theirs.is_floating_point():
            finding.problem = "is float where indices are expected"
            return
        theirs = quantizer.dequantize(theirs, mine.dtype)
    elif mine.stride() != theirs.stride() and mine.numel():
        finding.problem = f"strides {theirs.stride()}, expected {mine.stride()}"
        return
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        finding.problem = (
            f"{tuple(theirs.shape)} {theirs.dtype}, expected {tuple(mine.shape)} {mine.dtype}"
        )
        return
    unequal = _unequal(mine, theirs)
    finding.values += mine.numel()
    finding.differing += int(unequal.sum())
    if not unequal.any() or mine.dtype != torch.float32:
        return
    finding.ulp = max(finding.ulp, ulp_distance(mine, theirs))
    if isinstance(quantizer, Quantize):
        steps = (quantizer(mine).long() - index.long()).abs().max()
        finding.steps = max(finding.steps, int(steps))
