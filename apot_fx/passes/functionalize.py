"""Functionalise: no call writes into a tensor that another node can see.

With writes left in, a rewrite that copies or moves a node changes what others read. Every writing
call becomes the one that gives a new value, and whoever reads the tensor afterwards, or a view of
it, reads that value. Where sharing can't be proved, all writes into that memory stay, with a
reason, and everything that touches it stays float (``meta["pinned"]``).
"""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from ..errors import GrammarError
from ..graph import prune
from .aliasing import Aliases, view_step, write_view
from .base import Pass
from .mutation import AUGMENTED, mutated, why_in_place, write_out_of_place
from .report import PassReport
from .stage import StageModule, info, next_id, set_info


def is_functional(stage: StageModule) -> None:
    """No call writes in place but those that were left (``meta["keep"]``)."""
    for node in stage.graph.nodes:
        if mutated(stage, node) is not None and not node.meta.get("keep"):
            raise GrammarError(f"{node.name}: writes in place after functionalize")


class Functionalize(Pass):
    """Make in-place ops out-of-place and re-point later readers of the tensor and its views."""

    name = "functionalize"
    ensures = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        self._rewrite(stage, report)
        for name in prune(stage):
            report.change(name, "erased: nobody reads its result")

    def _rewrite(self, stage: StageModule, report: PassReport) -> None:
        graph = stage.graph
        writes = {n: t for n in graph.nodes if (t := mutated(stage, n)) is not None}
        for node in graph.nodes:  # counters and sizes: `+=` of a number writes nothing
            if node.target in AUGMENTED and node not in writes:
                node.target = AUGMENTED[node.target]
        if not writes:
            return
        aliases = Aliases(stage, graph, writes.get)
        kept = _Unprovable(stage, aliases, writes).roots
        values = _Values(aliases, {aliases.root(target) for target in writes.values()} - set(kept))
        modules: list[fx.Node] = []
        for node in list(graph.nodes):
            reason = kept.get(aliases.root(node))
            if reason is not None or any(aliases.root(n) in kept for n in node.all_input_nodes):
                node.meta["pinned"] = True
            if reason is not None and node in writes:
                node.meta["keep"] = True
                set_info(node, reason=f"writes in place: {reason}")
                report.leave(node, reason)
                continue
            values.update_arguments(node)
            if node in writes:
                if node.op == "call_module":
                    modules.append(node)  # one module may be called again: switched off at the end
                else:
                    write_out_of_place(stage, node)
                values.write(node, writes[node])
                report.change(node, "out of place; later readers re-pointed")
        for node in modules:
            write_out_of_place(stage, node)


class _Unprovable:
    """Memory whose writes must stay, by root, with the reason."""

    def __init__(
        self, stage: StageModule, aliases: Aliases, writes: dict[fx.Node, fx.Node]
    ) -> None:
        self.aliases = aliases
        self.order = {node: place for place, node in enumerate(stage.graph.nodes)}
        self.roots: dict[fx.Node, str] = {}
        self.last_read: dict[fx.Node, int] = {}
        for node in stage.graph.nodes:
            for source in node.all_input_nodes:
                self.last_read[aliases.root(source)] = self.order[node]
        # Roots that may share memory, and since when: what is made after a write reads its result.
        self.loose: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
        for first, second in aliases.loose:
            one, two, since = aliases.root(first), aliases.root(second), self.order[second]
            self.loose.setdefault(one, []).append((two, since))
            self.loose.setdefault(two, []).append((one, since))
        for node, target in writes.items():
            reason = self._why(stage, node, target)
            if reason:
                self._keep(aliases.root(target), reason)

    def _why(self, stage: StageModule, node: fx.Node, target: fx.Node) -> str:
        root = self.aliases.root(target)
        if root.op == "get_attr":
            return f"{root.target} belongs to the model and keeps its new value"
        reason = why_in_place(stage, node)
        if reason:
            return reason
        for other in self._neighbours(root, self.order[node]):
            if self.last_read.get(other, -1) > self.order[node]:
                return f"{other.name}, read later, may or may not share its memory"
        return ""

    def _neighbours(self, root: fx.Node, until: float = math.inf) -> set[fx.Node]:
        """Everything that may, at a place in the graph, share a root's memory."""
        found: set[fx.Node] = set()
        pending = [root]
        while pending:
            near = self.loose.get(pending.pop(), [])
            new = {other for other, since in near if since < until} - found - {root}
            found |= new
            pending.extend(new)
        return found

    def _keep(self, root: fx.Node, reason: str) -> None:
        for member in {root} | self._neighbours(root):
            self.roots.setdefault(member, reason)


class _Values:
    """What each tensor holds now, while the graph is walked in order."""

    def __init__(self, aliases: Aliases, roots: set[fx.Node]) -> None:
        self.aliases, self.roots = aliases, roots
        self.now: dict[fx.Node, fx.Node] = {}  # root → the node with its present value
        self.version: dict[fx.Node, int] = {}
        self.views: dict[fx.Node, tuple[int, fx.Node]] = {}  # view → its value at a version

    def update_arguments(self, reader: fx.Node) -> None:
        """Let a node read present values."""
        reader.args = fx.map_arg(reader.args, lambda arg: self.present(arg, reader))
        reader.kwargs = fx.map_arg(reader.kwargs, lambda arg: self.present(arg, reader))
        version = self.version.get(self.aliases.root(reader), 0)
        if version:  # a view made after a write is a view of its result
            self.views[reader] = (version, reader)

    def present(self, node: fx.Node, reader: fx.Node) -> fx.Node:
        """The node with the present value of a tensor; a view is made anew before ``reader``."""
        root = self.aliases.root(node)
        version = self.version.get(root, 0)
        if not version:
            return node
        if node is root:
            return self.now[root]
        parent, kind = self.aliases.parent[node]
        known = self.views.get(node)
        if known is not None and known[0] == version:
            return known[1]
        source = self.present(parent, reader)
        if kind == "same":
            return source
        with node.graph.inserting_before(reader):
            twin = node.graph.node_copy(node)
        # Not by comparing with parent: the first argument may be an earlier version of it.
        twin.args = (source, *twin.args[1:])
        set_info(twin, info(node), id=next_id(node.graph))
        self.views[node] = (version, twin)
        return twin

    def write(self, node: fx.Node, target: fx.Node) -> None:
        """Note that ``node``'s value is what ``target``'s memory holds from here on."""
        root, calls = self.aliases.root(target), self.aliases.chain(target)
        before = self.now.get(root, root)
        self.version[root] = version = self.version.get(root, 0) + 1
        if not calls:
            self.now[root] = node
            return
        steps: Any = tuple(view_step(call) for call in calls)
        with node.graph.inserting_after(node):
            whole = node.graph.call_function(write_view, (before, node, steps))
        set_info(whole, info(node), id=next_id(node.graph))
        self.now[root] = whole
        self.views[calls[-1]] = (version, node)
