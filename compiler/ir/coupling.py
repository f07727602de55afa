"""Coupling groups: which axes of which weights must lose an index together.

Derived from the operations' ``axes`` (the notation is in docs/graph.md). An axis may be a product of factors, such as
heads and head width; a factor is named by its stride, the number of positions below it. First every axis gets the
factors that any operation cuts it into, then factors that correspond are connected, and the connected components are
the groups. What no rule describes is frozen: a group that reaches it must not be pruned.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import networkx

from compiler.ir.graph import Graph, Node, Param, Value

Axis = tuple[Value, int]
Factor = tuple[Value, int, int]
Atoms = tuple[str, ...]
Cuts = dict[Axis, set[int]]
Limits = dict[str, dict[Factor, str]]

FROZEN, CHOSEN, NORMED = "!", "~", "%"
REASONS = {
    FROZEN: "gives meaning to positions along this axis",
    CHOSEN: "chooses among positions of this axis",
    NORMED: "averages over positions of this axis",
}


@dataclass(frozen=True)
class Member:
    """Position p of ``axis`` of ``param`` belongs to index ``(p // stride) % size`` of the group."""

    param: Param
    axis: int
    stride: int


@dataclass(frozen=True)
class CouplingGroup:
    """``size`` indices that can each be removed from all ``members`` at once, unless ``frozen`` says why not.

    ``chosen`` says that the indices compete, or are addressed by number: removing one is not zeroing it, but taking it
    from the choice, and whoever does so has to see to what holds the numbers. ``normed`` says that a norm averages over
    the indices: removing one changes what it divides by. ``values`` are the members that are no weights, (value, axis,
    stride).
    """

    size: int
    members: tuple[Member, ...]
    frozen: str = ""
    chosen: str = ""
    normed: str = ""
    values: tuple[Factor, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class _Rule:
    """One operand or result of an axis rule: the atoms of each axis, outermost first, and the marks behind some."""

    axes: tuple[Atoms, ...]
    marks: Mapping[str, str]


@dataclass(frozen=True)
class _Place:
    """An atom as part of an axis: ``offset`` positions lie below it."""

    axis: Axis
    atom: str
    offset: int
    mark: str


@dataclass
class _Node:
    """A node's atoms with their sizes and strides, and where they stand."""

    sizes: dict[str, int]
    places: list[_Place]

    def strides(self, atom: str, cuts: Cuts) -> set[int]:
        """The strides within ``atom`` that any of its places is cut at."""
        size = self.sizes[atom]
        return {
            stride // place.offset
            for place in self.places
            if place.atom == atom
            for stride in cuts.get(place.axis, ())
            if place.offset <= stride < place.offset * size and stride % place.offset == 0
        } | {1}


def coupling_groups(graph: Graph) -> list[CouplingGroup]:
    """The groups that hold at least one weight axis, in graph order. Symbolic axes take no part."""
    nodes = {node: _described(node) for node in graph.nodes}
    cuts = _cuts(graph, nodes)
    network: networkx.Graph[Factor] = networkx.Graph()
    network.add_nodes_from((*axis, stride) for axis, strides in cuts.items() for stride in strides)
    limits: Limits = {mark: {} for mark in REASONS}
    for node, described in nodes.items():
        _connect(network, node, described, cuts, limits)
    for name, value in (*graph.inputs.items(), *graph.outputs.items()):
        limits[FROZEN].update(dict.fromkeys(_factors_of(value, cuts), f"`{name}` is an input or output of the model"))
    found = (_group(component, cuts, limits) for component in networkx.connected_components(network))
    return [group for group in found if group.members]


def _group(component: set[Factor], cuts: Cuts, limits: Limits) -> CouplingGroup:
    members = [Member(value, axis, stride) for value, axis, stride in component if isinstance(value, Param)]
    members.sort(key=lambda member: (member.param.name, member.axis, member.stride))
    values = tuple(factor for factor in component if not isinstance(factor[0], Param))
    frozen, chosen, normed = (
        min((noted[factor] for factor in component if factor in noted), default="") for noted in limits.values()
    )
    value, axis, stride = next(iter(component))
    return CouplingGroup(_size((value, axis), stride, cuts), tuple(members), frozen, chosen, normed, values)


def _size(axis: Axis, stride: int, cuts: Cuts) -> int:
    """How many indices the factor of ``axis`` at ``stride`` has."""
    above = min((other for other in cuts[axis] if other > stride), default=static_size(axis))
    return above // stride


def static_size(axis: Axis) -> int:
    """The size of an axis; 0 when it is symbolic."""
    dim = axis[0].shape[axis[1]]
    return dim if isinstance(dim, int) else 0


def _factors_of(value: Value, cuts: Cuts) -> list[Factor]:
    return [(value, axis, stride) for axis in range(value.type.rank) for stride in cuts.get((value, axis), ())]


def _cuts(graph: Graph, nodes: dict[Node, _Node | None]) -> Cuts:
    """The strides at which every static axis is cut, spread over the graph until nothing changes."""
    values = [*graph.inputs.values(), *graph.params.values(), *(v for node in graph.nodes for v in node.outputs)]
    axes = [(value, axis) for value in values for axis in range(value.type.rank)]
    cuts: Cuts = {axis: {1} for axis in axes if static_size(axis)}
    described = [node for node in nodes.values() if node is not None]
    changed = True
    while changed:
        changed = sum(_spread(node, cuts) for sweep in (described, described[::-1]) for node in sweep) > 0
    return cuts


def _spread(node: _Node, cuts: Cuts) -> bool:
    """Cut every place of every atom as its other places are cut. Whether that added a cut."""
    added = False
    for place in node.places:
        strides = {stride * place.offset for stride in node.strides(place.atom, cuts)}
        added = added or not strides <= cuts[place.axis]
        cuts[place.axis] |= strides
    return added


def _connect(network: networkx.Graph[Factor], node: Node, described: _Node | None, cuts: Cuts, limits: Limits) -> None:
    """Connect what ``node`` couples, and note in ``limits`` what it allows of that, with the reason."""
    label = f"`{node.op.name}` in `{node.scope}`"
    touched = [f for v in (*node.inputs, *node.outputs) if v is not None for f in _factors_of(v, cuts)]
    if described is None:
        limits[FROZEN].update(dict.fromkeys(touched, f"{label} does not say how its axes correspond"))
        return
    if not all(_nested(place.axis, cuts) for place in described.places):
        limits[FROZEN].update(dict.fromkeys(touched, f"{label} has an axis that is cut in ways that do not nest"))
        return
    for atom in described.sizes:
        places = [place for place in described.places if place.atom == atom]
        for stride in described.strides(atom, cuts):
            factors: list[Factor] = [(*place.axis, stride * place.offset) for place in places]
            network.add_edges_from(pairwise(factors))
            for mark in {place.mark for place in places} & REASONS.keys():
                limits[mark].update(dict.fromkeys(factors, f"{label} {REASONS[mark]}"))


def _nested(axis: Axis, cuts: Cuts) -> bool:
    strides = [*sorted(cuts[axis]), static_size(axis)]
    return all(outer % inner == 0 for inner, outer in pairwise(strides))


def _described(node: Node) -> _Node | None:
    """The atoms of a node and where they stand, or None when its operation has no rule that fits."""
    rule = node.op.axis_rule([v and v.type for v in node.inputs], [v.type for v in node.outputs], node.attrs)
    if not rule:
        return None
    operands, results = _parse(rule)
    if len(node.inputs) > len(operands) or len(node.outputs) != len(results):
        return None
    found = _Node({}, [])
    pairs = [
        (v, rule)
        for v, rule in zip((*node.inputs, *node.outputs), (*operands[: len(node.inputs)], *results), strict=True)
        if v is not None
    ]
    expanded = [(value, rule, _expanded(rule, value.type.rank)) for value, rule in pairs]
    if any(axes is None for _, _, axes in expanded):
        return None
    spots = [((v, i), atoms, rule.marks) for v, rule, axes in expanded for i, atoms in enumerate(axes or ())]
    for axis, atoms, _ in sorted(spots, key=lambda spot: len(spot[1])):
        _learn_sizes(found.sizes, atoms, static_size(axis))
    symbolic = {atom: FROZEN for (value, i), atoms, _ in spots for atom in atoms if isinstance(value.shape[i], str)}
    for axis, atoms, marks in spots:
        if static_size(axis) not in (0, 1, math.prod(found.sizes.get(atom, 0) for atom in atoms)):
            return None
        found.places += _placed(found.sizes, axis, atoms, {**marks, **symbolic})
    return found


def _learn_sizes(sizes: dict[str, int], atoms: Atoms, size: int) -> None:
    """Note the size of the one atom of an axis that is not known yet; broadcast axes of size 1 say nothing."""
    unknown = [atom for atom in atoms if sizes.get(atom, 1) == 1]
    known = math.prod(sizes[atom] for atom in atoms if atom not in unknown)
    if len(unknown) == 1 and size and size % known == 0:
        sizes[unknown[0]] = size // known


def _placed(sizes: dict[str, int], axis: Axis, atoms: Atoms, marks: Mapping[str, str]) -> Iterator[_Place]:
    if not static_size(axis) or static_size(axis) != math.prod(sizes.get(atom, 0) for atom in atoms):
        return  # symbolic, or broadcast
    offset = 1
    for atom in reversed(atoms):
        if sizes[atom] > 1:
            yield _Place(axis, atom, offset, marks.get(atom, ""))
        offset *= sizes[atom]


def _expanded(rule: _Rule, rank: int) -> list[Atoms] | None:
    """The atoms of each axis with ``...`` written out, counted from its last axis; None when the rank does not fit."""
    spare = rank - len([axis for axis in rule.axes if axis != ("...",)])
    if spare < 0 or (spare and ("...",) not in rule.axes):
        return None
    axes: list[Atoms] = []
    for axis in rule.axes:
        axes += [(f"...{i}",) for i in reversed(range(spare))] if axis == ("...",) else [axis]
    return axes


@cache
def _parse(text: str) -> tuple[tuple[_Rule, ...], tuple[_Rule, ...]]:
    sides = [tuple(_rule(part) for part in side.split(",")) for side in text.split("->")]
    return sides[0], sides[1]


def _rule(text: str) -> _Rule:
    axes = [tuple(re.findall(r"\.\.\.|\w+", group)) for group in re.findall(r"\([^)]*\)|\.\.\.|\w+", text)]
    return _Rule(tuple(axes), dict(re.findall(r"(\w+)([!~%])", text)))
