"""Finding runs of identical consecutive layers, so that the printer can write one of them.

Two layers are identical when they have the same operations, attributes, types and relative names, and their operands
come from the same places: from the same spot in the layer, from the same value outside every layer, or from the same
spot in the layer before. The last kind is carried: in the first layer of the run it is a value from before the run.
Models that alternate (a window in every second layer) repeat a unit of several layers in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import Layer, segments

LONGEST_UNIT = 8

Spot = tuple[int, int]
Place = tuple[object, ...]
Describe = Callable[[Node, str], object]


@dataclass(frozen=True)
class Carry:
    """``initial`` in the first repetition, then what stands at ``source`` (node, output) in the one before."""

    initial: Value
    source: Spot


@dataclass(frozen=True)
class Part:
    """Consecutive nodes of one layer, or of none."""

    layer: Layer | None
    nodes: list[Node]

    @property
    def base(self) -> str:
        return self.layer.scope if self.layer else ""


@dataclass
class Block:
    """A unit of consecutive parts, and the nodes of the identical units that follow it. Spots count over the unit."""

    parts: list[Part]
    repeats: list[list[Node]] = field(default_factory=list[list[Node]])
    carried: dict[Spot, Carry] = field(default_factory=dict[Spot, Carry])

    @property
    def nodes(self) -> list[Node]:
        return _nodes(self.parts)

    @property
    def carries(self) -> list[Carry]:
        return list(dict.fromkeys(self.carried.values()))


def parts_of(graph: Graph) -> list[Part]:
    """The nodes of ``graph`` cut into layers."""
    return [Part(layer, nodes) for layer, nodes in segments(graph)]


def folded(graph: Graph, describe: Describe) -> list[Block]:
    """The nodes of ``graph`` cut into layers, with runs of identical units of layers as one block each.

    ``describe(node, base)`` is what must agree between layers besides operands; it sees names relative to ``base``.
    """
    parts, position = parts_of(graph), 0
    looks = [[describe(node, part.base) for node in part.nodes] for part in parts]
    outputs = set(graph.outputs.values())
    blocks: list[Block] = []
    while position < len(parts):
        run = _longest_run(parts[position:], looks[position:], outputs)
        blocks.append(_as_block(run))
        position += len(run) * len(run[0])
    return blocks


def _longest_run(parts: list[Part], looks: list[list[object]], outputs: set[Value]) -> list[list[Part]]:
    """The run of units at the start of ``parts`` that leaves the fewest layers to write."""
    best = [parts[:1]]
    for size in range(1, min(LONGEST_UNIT, len(parts) // 2) + 1):
        run = _run(parts, looks, size, outputs)
        if (len(run) - 1) * size > (len(best) - 1) * len(best[0]):
            best = run
        if len(best) * len(best[0]) + size >= _same_stack(parts):
            break
    return best


def _same_stack(parts: list[Part]) -> int:
    """How many parts from the start are successive layers of one stack."""
    first = parts[0].layer
    if first is None:
        return 0
    follow = takewhile(lambda pair: pair[1].layer == Layer(first.stack, first.index + pair[0]), enumerate(parts))
    return sum(1 for _ in follow)


def _run(parts: list[Part], looks: list[list[object]], size: int, outputs: set[Value]) -> list[list[Part]]:
    """Identical units of ``size`` parts, as many as there are."""
    run = [parts[:size]]
    for start in range(size, min(len(parts), _same_stack(parts)) - size + 1, size):
        unit = parts[start : start + size]
        if looks[start : start + size] != looks[:size] or not _continues(run, unit, outputs):
            break
        run.append(unit)
    return run


def _continues(run: list[list[Part]], unit: list[Part], outputs: set[Value]) -> bool:
    """Whether ``unit`` is wired to the last unit of ``run`` as that one is to the unit before it."""
    last, nodes = _nodes(run[-1]), _nodes(unit)
    if _escapes(last, nodes, outputs):
        return False
    places = _places(nodes, last)
    if len(run) > 1:
        return places == _places(last, _nodes(run[-2]))
    first = _places(last, [])
    return first.keys() == places.keys() and all(
        place == first[spot] or (place[0] == "before" and first[spot][0] == "outside") for spot, place in places.items()
    )


def _escapes(last: list[Node], following: list[Node], outputs: set[Value]) -> bool:
    """Whether a value of ``last`` is read elsewhere than in it and the unit after it."""
    readers = {*last, *following}
    values = [value for node in last for value in node.outputs]
    return any(value in outputs or not value.users.keys() <= readers for value in values)


def _as_block(run: list[list[Part]]) -> Block:
    block = Block(run[0], [_nodes(unit) for unit in run[1:]])
    if block.repeats:
        for spot, (kind, *source) in _places(block.repeats[0], block.nodes).items():
            if kind == "before":
                block.carried[spot] = Carry(block.nodes[spot[0]].input(spot[1]), (source[0], source[1]))  # pyright: ignore[reportArgumentType]
    return block


def _nodes(parts: Sequence[Part]) -> list[Node]:
    return [node for part in parts for node in part.nodes]


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
