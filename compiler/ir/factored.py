"""Roles of factors: what the one linear map does that they stand for together.

Two linear maps with nothing between them are one map of a lower rank, and so is a map of some outputs (pivots), a map
of these to the others, and an order that puts all in their places. A copy of the graph gets one map in the place of
each of them; its weight's roles are those of all that it stands for, where these have none of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import copy_of
from compiler.ir.roles import roles
from compiler.weights.ops.basic import full


@dataclass(frozen=True)
class Factored:
    """``last`` makes of x, which ``first`` reads, what one map would. ``weights`` are the factors."""

    first: Node
    last: Node
    weights: tuple[Value, ...]


def roles_with_factors(graph: Graph) -> dict[Param, set[str]]:
    """The roles of every weight that has any; factors have those of what they stand for."""
    found = roles(graph)
    if next(_factored(graph), None) is None:
        return found
    whole = copy_of(graph)
    places = [(place, _collapsed(whole, place)) for place in list(_factored(whole))]
    whole.prune()
    known = roles(whole)
    plain = {param.name for param, names in found.items() if names == {"linear"}}
    for place, stand_in in places:
        for weight in place.weights:
            if isinstance(weight, Param) and weight.name in plain:
                found[graph.params[weight.name]] |= known.get(stand_in, set())
    return found


def _factored(graph: Graph) -> Iterator[Factored]:
    for node in graph.nodes:
        if node.op.name == "linear":
            first = _linear(node.input(0))
            if first is not None and all(user.op.name == "linear" for user in first.output.users):
                yield Factored(first, node, (first.input(1), node.input(1)))
        elif node.op.name == "take":
            yield from _pivoted(node)


def _pivoted(node: Node) -> Iterator[Factored]:
    joined = node.input(0).node
    if joined is None or joined.op.name != "concat" or len(joined.inputs) != 2:
        return
    pivots, others = _linear(joined.input(0)), _linear(joined.input(1))
    if pivots is not None and others is not None and others.input(0) is pivots.output:
        yield Factored(pivots, node, (pivots.input(1), others.input(1)))


def _linear(value: Value) -> Node | None:
    node = value.node
    return node if node is not None and node.op.name == "linear" else None


def _collapsed(graph: Graph, place: Factored) -> Param:
    """The weight of the one map that now stands in ``place``."""
    x, last = place.first.input(0), place.last
    rows, columns = int(last.output.shape[-1]), int(x.shape[-1])
    weight = graph.add_param(f"{last.scope} {len(graph.params)}", full((rows, columns), 0.0))
    graph.replace(last.output, graph.op("linear", [x, weight], scope=last.scope, before=last))
    graph.erase(last)
    return weight
