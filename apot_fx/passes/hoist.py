"""Hoist: move quantizers up over index ops, to where values are produced.

Done in prepare, so that both stages quantize at the same place (NaN and max-pool do not commute;
all else does). A clamp right above a fake-quant moves up with it: ``relu(max_pool(x))`` becomes
``max_pool(relu(x))``, the same values.
"""

from __future__ import annotations

import math

from torch import fx

from ..fake_quant import FakeQuantize
from ..graph import called_module, prune, reads_metadata, replace_argument
from .base import Pass
from .grammar import is_hoisted, is_prepared
from .index_ops import IndexOp, bounds, index_op
from .insert import insert_call
from .report import PassReport
from .stage import StageModule, info, next_id, set_info

Clamps = tuple[fx.Node, ...]  # in the order in which they are applied


class Hoist(Pass):
    """Move every fake-quant call up until it reads a value that no index op made.

    Float readers keep the raw float value: the index op is copied for the quantized path. Dropout
    (an identity in eval) and max pools are passed only where nobody else reads them: a copy of the
    one would draw another mask, and two pools cost more than one and what indices save.
    """

    name = "hoist"
    requires = (is_prepared,)
    ensures = (is_hoisted,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        before = set(stage.graph.nodes)
        twins: dict[fx.Node, fx.Node] = {}
        for call in list(stage.graph.nodes):
            if not isinstance(called_module(stage, call), FakeQuantize):
                continue
            source = call.args[0]
            moved = _Mover(stage, call, twins).quantized(source, ())
            if moved is call:
                continue
            report.change(call.target, f"moved above {source.name}")
            if moved not in before:  # it carries the value that the call had
                set_info(moved, id=info(call).id)
                before.add(moved)
            call.replace_all_uses_with(moved)
            stage.graph.erase_node(call)
        _read_metadata_from_quantized(stage, twins)
        prune(stage)


class _Mover:
    """Finds or makes, for one fake-quant call, the quantized form of any value above it."""

    def __init__(self, stage: StageModule, call: fx.Node, twins: dict[fx.Node, fx.Node]) -> None:
        self.stage, self.call, self.name = stage, call, str(call.target)
        self.twins = twins  # float value → a quantized value of its shape

    def quantized(self, node: fx.Node, clamps: Clamps) -> fx.Node:
        """The node that carries ``fake_quant(clamps(node))``."""
        found = self._quantized(node, clamps)
        self.twins.setdefault(node, found)
        return found

    def _quantized(self, node: fx.Node, clamps: Clamps) -> fx.Node:
        source = node.args[0] if node.args else None
        if bounds(self.stage, node) is not None and isinstance(source, fx.Node):
            return self.quantized(source, (node, *clamps))
        match = index_op(self.stage, node)
        if match is not None and self._may_pass(match, node, clamps):
            sources = {source: self.quantized(source, clamps) for source in match.inputs}
            return self._repeat(node, sources, quantizer=self.name)
        for clamp in clamps:
            node = self._clamped(node, clamp)
        return self._fake_quant_of(node)

    def _may_pass(self, match: IndexOp, node: fx.Node, clamps: Clamps) -> bool:
        limits = [bounds(self.stage, clamp) or (0.0, 0.0) for clamp in clamps]
        if match.kind == "zero_pad":
            return all(low <= 0 <= high for low, high in limits)
        if match.kind == "dropout":  # scales values in train: only relu commutes with that
            ends = {end for pair in limits for end in pair}
            return ends <= {0.0, math.inf, -math.inf} and self._feeds_only_this(node)
        return match.kind != "max" or self._feeds_only_this(node)

    def _feeds_only_this(self, node: fx.Node) -> bool:
        pending, seen = list(node.users), set()
        while pending:
            user = pending.pop()
            if user in seen or user is self.call or reads_metadata(user):
                continue
            seen.add(user)
            if index_op(self.stage, user) is None and bounds(self.stage, user) is None:
                return False
            pending.extend(user.users)
        return True

    def _clamped(self, node: fx.Node, clamp: fx.Node) -> fx.Node:
        source = clamp.args[0]
        assert isinstance(source, fx.Node)
        return clamp if source is node else self._repeat(clamp, {source: node}, after=node)

    def _repeat(
        self,
        node: fx.Node,
        sources: dict[fx.Node, fx.Node],
        after: fx.Node | None = None,
        quantizer: str = "",
    ) -> fx.Node:
        """The call of ``node`` on other sources: one that exists, or a new one."""
        args = fx.map_arg(node.args, lambda arg: sources.get(arg, arg))
        kwargs = fx.map_arg(node.kwargs, lambda arg: sources.get(arg, arg))
        for user in next(iter(sources.values())).users:
            same = (user.op, user.target, user.args, user.kwargs)
            if same == (node.op, node.target, args, kwargs):
                return user
        with node.graph.inserting_after(after or node):
            twin = node.graph.create_node(node.op, node.target, args, kwargs)
        twin.meta = dict(node.meta)
        set_info(twin, info(node), id=next_id(node.graph), quantizer=quantizer)
        return twin

    def _fake_quant_of(self, node: fx.Node) -> fx.Node:
        for user in node.users:
            if user.op == "call_module" and user.target == self.name:
                return user
        return insert_call(self.stage, self.name, node)


def _read_metadata_from_quantized(stage: StageModule, twins: dict[fx.Node, fx.Node]) -> None:
    """Let ``size()`` and the like read a quantized twin, so that no float value stays for it."""
    seen: set[fx.Node] = set()
    for node in stage.graph.nodes:
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and twins.get(source) in seen and reads_metadata(node):
            replace_argument(node, source, twins[source])
        seen.add(node)
