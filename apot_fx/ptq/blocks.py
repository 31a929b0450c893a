"""Blocks of a graph: stretches that one value alone enters and one alone leaves.

*Moving* values depend on a layer that is learned, or are what the first one reads. A place where a
single moving value is alive is a cut; what lies between two cuts (a residual block, parallel
branches, one layer with its relu) has one result, so that its float result is a target for all the
layers in it. Values that do not move (a mask, say) may come in anywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import takewhile

from torch import fx

from ..fake_quant import FakeQuantize
from ..graph import called_module, value_kind
from ..passes.functional_layers import constants
from ..passes.index_ops import bounds
from ..passes.share import roots_of
from ..passes.stage import StageModule, inputs_of

#: So many layers are learned at once where the graph has no larger stretch without a cut.
LAYERS = 3
#: Larger stretches (a whole U-net) are learned layer by layer.
MOST_LAYERS = 10

#: Layers that are learned in the call of a node, by the node.
Calls = Mapping[fx.Node, Collection[str]]


@dataclasses.dataclass
class Block:
    """Nodes in graph order, of which the last value is ``end``.

    ``layers``: those it decides; ``ahead``: those behind them, which are learned along so that they
    can make up for the first ones' errors, and are decided in a later block.
    """

    nodes: list[fx.Node]
    end: fx.Node
    layers: list[str]
    ahead: list[str]

    def inputs(self) -> list[fx.Node]:
        """Values from before that it reads."""
        inside = set(self.nodes)
        read = (source for node in self.nodes for source in node.all_input_nodes)
        return list(dict.fromkeys(source for source in read if source not in inside))


@dataclasses.dataclass
class _Piece:
    """Part of a graph from cut to cut; ``end``: the moving value that leaves it, if it is one."""

    nodes: list[fx.Node]
    end: fx.Node | None
    layers: list[str]


def blocks(stage: StageModule, calls: Calls) -> list[Block]:
    """Blocks of a stage in graph order, one for each stretch between two cuts that has layers; of
    one layer where that has too many."""
    found: list[Block] = []
    graph = _Graph(stage, calls)
    pieces = list(graph.pieces())
    for place, piece in enumerate(pieces):
        if graph.has_one_end(piece) and len(piece.layers) <= MOST_LAYERS:
            following = takewhile(graph.has_one_end, pieces[place + 1 :])
            found.append(graph.block(piece, _ahead(piece, following)))
        else:
            found.extend(graph.single_layers(piece))
    # What may be written in place has another value later.
    return [b for b in found if not any(n.meta.get("pinned") for n in (*b.nodes, *b.inputs()))]


def _ahead(piece: _Piece, following: Iterable[_Piece]) -> list[_Piece]:
    """The pieces that are learned along with one."""
    count, found = len(piece.layers), list[_Piece]()
    for other in following:
        if count >= LAYERS or count + len(other.layers) > MOST_LAYERS:
            break
        count += len(other.layers)
        found.append(other)
    return found


class _Graph:
    """A stage's graph: which values move, and which hang on parameters alone."""

    def __init__(self, stage: StageModule, calls: Calls) -> None:
        self.stage, self.calls = stage, calls
        self.order = [node for node in stage.graph.nodes if node.op != "output"]
        self.place = {node: number for number, node in enumerate(stage.graph.nodes)}
        self.constant = constants(stage)
        self.moving = self._entry()
        for node in self.order:
            sources = [n for n in node.all_input_nodes if n in self.moving]
            # A tensor that hangs on nothing but sizes (a mask) does not move; other sizes do.
            is_size = value_kind(node) == "other"
            moves = any(is_size or value_kind(n) != "other" for n in sources)
            if calls.get(node) or moves:
                self.moving.add(node)
        self.sinks: set[fx.Node] = set()
        for node in reversed(stage.graph.nodes):
            is_object = value_kind(node) == "other" and all(n in self.sinks for n in node.users)
            if node.op == "output" or is_object:
                self.sinks.add(node)

    def _entry(self) -> set[fx.Node]:
        """What the first layer reads: a residual path may start there."""
        first = next((node for node in self.order if self.calls.get(node)), None)
        if first is None or not inputs_of(first):
            return set()
        source = roots_of(self.stage, inputs_of(first)[0])[0]
        while isinstance(called_module(self.stage, source), FakeQuantize):
            source = roots_of(self.stage, inputs_of(source)[0])[0]
        return {source} - self.constant

    def pieces(self) -> Iterator[_Piece]:
        """Stretches from a fake-quant or layer to just before the next one; those with layers.

        What follows the last layer (a softmax, an argmax) is in none.
        """
        piece = last = _Piece([], None, [])
        for nodes, end in self._stretches():
            own = [layer for node in nodes for layer in self.calls.get(node, ())]
            starts = own or any(
                isinstance(called_module(self.stage, n), FakeQuantize) for n in nodes
            )
            if starts and piece.layers:
                yield piece
                piece = _Piece([], None, [])
            piece = _Piece([*piece.nodes, *nodes], end, [*piece.layers, *own])
            last = piece if own else last
        if piece.layers:
            yield last

    def _stretches(self) -> Iterator[tuple[list[fx.Node], fx.Node | None]]:
        """Nodes from cut to cut, each with the moving value that alone is read after it.

        Being a result is no reading, nor is going into one: a decoder gives every layer's keys.
        """
        alive: set[fx.Node] = set()
        stretch: list[fx.Node] = []
        for number, node in enumerate(self.order):
            stretch.append(node)
            if node in self.moving and value_kind(node) != "other":
                alive.add(node)
            alive = {one for one in alive if self._read_after(one, number)}
            if len(alive) < 2:
                results = [n for n in stretch if n in self.moving and self.sinks & set(n.users)]
                ends = alive or (results if len(results) == 1 else ())
                yield stretch, next(iter(ends), None)
                stretch = []
        if stretch:
            yield stretch, None

    def _read_after(self, node: fx.Node, number: int) -> bool:
        return any(self.place[n] > number and n not in self.sinks for n in node.users)

    def has_one_end(self, piece: _Piece) -> bool:
        """Whether all its layers have a part in the value that leaves it."""
        if piece.end is None:
            return False
        nodes = self.block(piece, []).nodes
        return {n for n in piece.nodes if self.calls.get(n)} <= set(nodes)

    def single_layers(self, piece: _Piece) -> Iterator[Block]:
        """Each layer that a node calls, with the relu behind it."""
        for node in piece.nodes:
            if len(self.calls.get(node, ())) == 1:
                end, nodes = node, [node]
                while len(end.users) == 1 and bounds(self.stage, next(iter(end.users))) is not None:
                    end = next(iter(end.users))
                    nodes.append(end)
                yield self.block(_Piece(nodes, end, list(self.calls[node])), [])

    def block(self, piece: _Piece, ahead: list[_Piece]) -> Block:
        """What the end needs of the nodes that move, and the constants that these need."""
        nodes = [node for part in (piece, *ahead) for node in part.nodes]
        layers = [layer for part in ahead for layer in part.layers]
        end = (ahead or [piece])[-1].end
        assert end is not None
        inside = self.constant | {n for n in nodes if n in self.moving and n.op != "placeholder"}
        needed, pending = {end}, [end]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source in inside and source not in needed:
                    needed.add(source)
                    pending.append(source)
        return Block([n for n in self.order if n in needed], end, piece.layers, layers)
