"""Whether two graphs are the same program, and where they first differ if not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest

from compiler.ir.graph import Graph, Node, Param, Value


def equal(left: Graph, right: Graph, *, weights: bool = True) -> bool:
    """Whether the graphs are structurally equal; see ``difference``."""
    return difference(left, right, weights=weights) is None


def difference(left: Graph, right: Graph, *, weights: bool = True) -> str | None:
    """The first difference in words, or None.

    Compared are the name, inputs and outputs with their types, nodes in order with operation, attributes, operands,
    types and scope, and parameters by name. ``weights`` also compares how parameters are made and stored. Names of
    computed values, the order of parameters, origin and sources do not count.
    """
    return next(_differences(left, right, weights), None)


def _differences(left: Graph, right: Graph, weights: bool) -> Iterator[str]:
    if left.name != right.name:
        yield f"names {left.name} and {right.name}"
    pairs: dict[Value, Value] = {}
    yield from _interface("inputs", left.inputs, right.inputs)
    pairs.update(zip(left.inputs.values(), right.inputs.values(), strict=False))
    if left.params.keys() != right.params.keys():
        yield f"parameters {sorted(left.params.keys() ^ right.params.keys())} are in one only"
    for name, param in left.params.items():
        pairs[param] = right.params[name]
        yield from _param(param, right.params[name], weights)
    for one, other in zip_longest(left.nodes, right.nodes):
        yield from _node(one, other, pairs)
        pairs.update(zip(one.outputs, other.outputs, strict=True))
    yield from _interface("outputs", left.outputs, right.outputs)
    for name, value in left.outputs.items():
        if pairs[value] is not right.outputs[name]:
            yield f"output {name} is another value"


def _interface(what: str, left: dict[str, Value], right: dict[str, Value]) -> Iterator[str]:
    shown = [", ".join(f"{name}: {value.type}" for name, value in side.items()) for side in (left, right)]
    if shown[0] != shown[1]:
        yield f"{what} ({shown[0]}) and ({shown[1]})"


def _param(left: Param, right: Param, weights: bool) -> Iterator[str]:
    if left.type != right.type:
        yield f"parameter {left.name} is {left.type} and {right.type}"
    if not weights:
        return
    if left.expr != right.expr:
        yield f"parameter {left.name} is made differently"
    if (left.storage, left.aliases, left.persistent) != (right.storage, right.aliases, right.persistent):
        yield f"parameter {left.name} is stored differently"


def _node(left: Node | None, right: Node | None, pairs: dict[Value, Value]) -> Iterator[str]:
    if left is None or right is None:
        node = left or right
        yield f"only one goes on with {node.op.name} in {node.scope}" if node else "lengths"
        return
    where = f"{left.op.name} in {left.scope}"
    if (left.op.name, left.scope) != (right.op.name, right.scope):
        yield f"{where} and {right.op.name} in {right.scope}"
    if left.attrs != right.attrs:
        yield f"{where} has attributes {left.attrs} and {right.attrs}"
    if [value.type for value in left.outputs] != [value.type for value in right.outputs]:
        yield f"{where} gives other types"
    if [value and pairs[value] for value in left.inputs] != list(right.inputs):
        yield f"{where} has other operands"
