"""What a rule sees: the node it may replace, and helpers to look backwards from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from compiler.ir.graph import Graph, Node, Value


@dataclass(frozen=True)
class Site:
    """A node under rewriting. New operations go in front of it and take its scope."""

    graph: Graph
    node: Node

    def op(self, op: str, *inputs: Value | None, **attrs: Any) -> Value:
        return self.graph.op(op, inputs, attrs, scope=self.node.scope, before=self.node)


@dataclass(frozen=True)
class Refused:
    """A rule fits a node but must leave it alone, or nearly fits it: why, and where if not at the node itself."""

    reason: str
    where: Node | None = None


Rule = Callable[[Site], Value | Refused | None]
"""What replaces the only output of the site's node, a reason against it, or None where the rule has nothing to say."""


def made_by(value: Value | None, *ops: str) -> Node | None:
    """The node that computes ``value``, if its operation is one of ``ops``."""
    if value is None or value.node is None or value.node.op.name not in ops:
        return None
    return value.node


def orders(node: Node) -> Iterator[tuple[Value, Value]]:
    """The two operands of a commutative operation, both ways round. Nothing when the second is a scalar."""
    if len(node.inputs) == 2:
        first, second = node.input(0), node.input(1)
        yield first, second
        yield second, first


def scalar_of(node: Node) -> float | None:
    """The scalar operand of a binary operation, if it has one."""
    return node.attrs.get("scalar")


def last_axis_slice(value: Value) -> tuple[Value, int, int, int] | None:
    """(x, start, stop, step) when ``value`` is a slice of the last axis of x with known bounds."""
    node = made_by(value, "slice")
    if node is None or node.attr("axis") != value.type.rank - 1:
        return None
    start, stop = node.attr("start"), node.attr("stop")
    if not isinstance(start, int) or not isinstance(stop, int):
        return None
    return node.input(0), start, stop, node.attr("step")
