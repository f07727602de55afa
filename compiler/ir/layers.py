"""Layers: runs of nodes below one numbered module, and graphs cut out of a graph."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from compiler.ir.graph import Graph, Node, Param, Value


@dataclass(frozen=True)
class Layer:
    """A numbered module of a stack: ``Layer("model.layers", 3)`` is the module ``model.layers.3``."""

    stack: str
    index: int

    @property
    def scope(self) -> str:
        return f"{self.stack}.{self.index}" if self.stack else str(self.index)


def layer_of(path: str) -> Layer | None:
    """The outermost numbered module on a module path, or None."""
    parts = path.split(".")
    for depth, part in enumerate(parts):
        if part.isdigit():
            return Layer(".".join(parts[:depth]), int(part))
    return None


def segments(graph: Graph) -> list[tuple[Layer | None, list[Node]]]:
    """The nodes in order, cut wherever the layer changes."""
    return [(layer, list(nodes)) for layer, nodes in groupby(graph.nodes, lambda node: layer_of(node.scope))]


def subgraph(graph: Graph, nodes: Sequence[Node], name: str) -> Graph:
    """A copy of ``nodes`` as a graph of its own.

    Values the nodes read from outside become inputs (``x0``, ``x1``, … unless they are named inputs already), values
    read outside become outputs (``y0``, …). Parameters keep their names and expressions.
    """
    inside = set(nodes)
    part = Graph(name, graph.origin)
    part.sources = graph.sources
    copies: dict[Value, Value] = {}
    _copy(nodes, part, copies)
    results = set(graph.outputs.values())
    for node in nodes:
        for value in node.outputs:
            if value in results or not value.users.keys() <= inside:
                part.outputs[f"y{len(part.outputs)}"] = copies[value]
    return part


def copy_of(graph: Graph) -> Graph:
    """A copy of ``graph`` that can be rewritten on its own. Weights and their sources are shared."""
    copied = Graph(graph.name, graph.origin)
    copied.sources, copied.tokens = graph.sources, graph.tokens
    copies: dict[Value, Value] = {value: copied.add_input(name, value.type) for name, value in graph.inputs.items()}
    _copy(graph.nodes, copied, copies)
    copied.outputs = {name: copies[value] for name, value in graph.outputs.items()}
    return copied


def _copy(nodes: Iterable[Node], into: Graph, copies: dict[Value, Value]) -> None:
    for node in nodes:
        inputs = [None if value is None else copies.get(value) or _outer(into, copies, value) for value in node.inputs]
        copied = into.append(node.op.name, inputs, node.attrs, scope=node.scope)
        copies.update(zip(node.outputs, copied.outputs, strict=True))


def _outer(part: Graph, copies: dict[Value, Value], value: Value) -> Value:
    if isinstance(value, Param):
        copies[value] = part.add_param(
            value.name,
            value.expr,
            value.storage,
            dtype=value.type.dtype,
            aliases=value.aliases,
            persistent=value.persistent,
        )
    else:
        name = value.name if value.node is None else f"x{len(part.inputs)}"
        copies[value] = part.add_input(name, value.type)
    return copies[value]
