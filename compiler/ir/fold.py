"""Finding runs of identical consecutive layers, so that the printer can write one of them.

Two layers are identical when they have the same operations, attributes, types and relative names, and their operands
come from the same places: from the same spot in the layer, from the same value outside every layer, or from the same
spot in the layer before. The last kind is carried: in the first layer of the run it is a value from before the run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import Layer, segments

Spot = tuple[int, int]
Place = tuple[object, ...]
Describe = Callable[[Node, str], object]


@dataclass(frozen=True)
class Carry:
    """``initial`` in the first repetition, then what stands at ``source`` (node, output) in the one before."""

    initial: Value
    source: Spot


@dataclass
class Block:
    """Consecutive nodes of one layer (or of none), and the identical layers that follow it."""

    layer: Layer | None
    nodes: list[Node]
    repeats: list[list[Node]] = field(default_factory=list[list[Node]])
    carried: dict[Spot, Carry] = field(default_factory=dict[Spot, Carry])

    @property
    def base(self) -> str:
        return self.layer.scope if self.layer else ""

    @property
    def carries(self) -> list[Carry]:
        return list(dict.fromkeys(self.carried.values()))


def blocks_of(graph: Graph) -> list[Block]:
    """The nodes of ``graph`` cut into layers, nothing folded."""
    return [Block(layer, nodes) for layer, nodes in segments(graph)]


def folded(graph: Graph, describe: Describe) -> list[Block]:
    """Like ``blocks_of``, with runs of identical layers as one block each.

    ``describe(node, base)`` is what must agree between layers besides operands; it sees names relative to ``base``.
    """
    run: list[Block] = []
    results: list[Block] = []
    outputs = set(graph.outputs.values())
    for block in blocks_of(graph):
        if run and _extends(run, block, describe, outputs):
            run.append(block)
        else:
            results += _as_one(run)
            run = [block]
    return results + _as_one(run)


def _as_one(run: list[Block]) -> list[Block]:
    if len(run) < 2:
        return run
    first, second = run[0], run[1]
    carried: dict[Spot, Carry] = {}
    for spot, place in _places(second.nodes, first.nodes).items():
        if place[0] == "before":
            carried[spot] = Carry(first.nodes[spot[0]].input(spot[1]), (place[1], place[2]))  # pyright: ignore[reportArgumentType]
    return [Block(first.layer, first.nodes, [block.nodes for block in run[1:]], carried)]


def _extends(run: list[Block], block: Block, describe: Describe, outputs: set[Value]) -> bool:
    last, first = run[-1], run[0]
    if block.layer is None or last.layer is None or len(block.nodes) != len(first.nodes):
        return False
    if block.layer != Layer(last.layer.stack, last.layer.index + 1):
        return False
    alike = all(
        describe(one, first.base) == describe(other, block.base)
        for one, other in zip(first.nodes, block.nodes, strict=True)
    )
    return alike and not _escapes(last, block, outputs) and _wired_alike(run, block)


def _escapes(last: Block, following: Block, outputs: set[Value]) -> bool:
    """Whether a value of ``last`` is read elsewhere than in it and the layer after it."""
    readers = {*last.nodes, *following.nodes}
    values = [value for node in last.nodes for value in node.outputs]
    return any(value in outputs or not value.users.keys() <= readers for value in values)


def _wired_alike(run: list[Block], block: Block) -> bool:
    places = _places(block.nodes, run[-1].nodes)
    if len(run) > 1:
        return places == _places(run[-1].nodes, run[-2].nodes)
    first = _places(run[0].nodes, [])
    return first.keys() == places.keys() and all(
        place == first[spot] or (place[0] == "before" and first[spot][0] == "outside") for spot, place in places.items()
    )


def _places(nodes: Sequence[Node], before: Sequence[Node]) -> dict[Spot, Place]:
    """Where every operand comes from. Parameters are left to ``describe``."""
    known: dict[Value, Place] = {value: ("before", *spot) for spot, value in _spots(before)}
    known.update({value: ("inside", *spot) for spot, value in _spots(nodes)})
    return {
        (index, operand): known.get(value, ("outside", value))
        for index, node in enumerate(nodes)
        for operand, value in enumerate(node.inputs)
        if value is not None and not isinstance(value, Param)
    }


def _spots(nodes: Sequence[Node]) -> list[tuple[Spot, Value]]:
    return [((index, output), value) for index, node in enumerate(nodes) for output, value in enumerate(node.outputs)]
