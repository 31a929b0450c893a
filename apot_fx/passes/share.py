"""Share: which quantized edges use one fake-quant module.

One module per (root through index ops, spec): values that are only moved about between their
producer and several layers are quantized once. A cat joins its operands under one α.
"""

from __future__ import annotations

from torch import fx

from ..config import ActivationSpec
from .annotate import plan_of
from .base import Pass
from .functionalize import is_functional
from .index_ops import index_op, non_negative
from .report import PassReport
from .stage import StageModule, inputs_of

#: ``node.meta`` key of a layer's call: number of each input's fake-quant.
GROUPS = "apot_groups"
#: ``node.meta`` key of a layer's call: whether the graph proves each input non-negative.
UNSIGNED = "apot_unsigned"

Root = tuple[fx.Node, ActivationSpec]


class Share(Pass):
    """Number the fake-quants and write each quantized call's number on it."""

    name = "share"
    requires = (is_functional,)

    def run(self, stage: StageModule, report: PassReport) -> None:
        groups = _Groups()
        edges: list[tuple[fx.Node, list[Root]]] = []
        for node in stage.graph.nodes:
            plan = plan_of(node)
            if plan is None or plan.activation is None:
                continue
            firsts: list[Root] = []
            for source in inputs_of(node):
                roots = [(root, plan.activation) for root in roots_of(stage, source)]
                firsts.append(roots[0])
                for root in roots:
                    groups.join(firsts[-1 if plan.apart else 0], root)
            edges.append((node, firsts))
        positive, members = non_negative(stage), groups.members()
        numbers: dict[Root, int] = {}
        for node, firsts in edges:
            found = [groups.find(root) for root in firsts]
            node.meta[GROUPS] = tuple(numbers.setdefault(group, len(numbers)) for group in found)
            node.meta[UNSIGNED] = tuple(
                all(member in positive for member, _ in members[group]) for group in found
            )
            names = (f"activation_post_process_{n}" for n in dict.fromkeys(node.meta[GROUPS]))
            report.change(node, f"reads {', '.join(names)}")


def roots_of(stage: StageModule, node: fx.Node) -> list[fx.Node]:
    """The values that a value consists of, found through index ops; in graph order of reading."""
    pending, roots, seen = [node], [], set()
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        match = index_op(stage, current)
        if match is None:
            roots.append(current)
        else:
            pending.extend(reversed(match.inputs))
    return roots


class _Groups:
    """Union-find over roots."""

    def __init__(self) -> None:
        self._parent: dict[Root, Root] = {}

    def find(self, root: Root) -> Root:
        self._parent.setdefault(root, root)
        while self._parent[root] != root:
            self._parent[root] = self._parent[self._parent[root]]
            root = self._parent[root]
        return root

    def join(self, first: Root, second: Root) -> None:
        self._parent[self.find(second)] = self.find(first)

    def members(self) -> dict[Root, list[Root]]:
        """All roots, by their group."""
        found: dict[Root, list[Root]] = {}
        for root in self._parent:
            found.setdefault(self.find(root), []).append(root)
        return found
