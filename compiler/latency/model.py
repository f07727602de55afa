"""The latency of a graph, as it is or with other shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from compiler.ir.graph import Graph, Node, Value
from compiler.ir.types import TensorType
from compiler.latency.table import Table
from compiler.latency.task import Task, task_of

Types = Mapping[Value, TensorType]


class Latency:
    """What the nodes of ``graph`` take by ``table``, with ``batch`` samples of ``tokens`` tokens.

    Of a causal model's logits those of the last token are counted: what generation needs of a prompt.
    """

    def __init__(self, graph: Graph, table: Table, batch: int, tokens: int) -> None:
        self._graph = graph
        self.table = table
        symbols = {d for v in graph.inputs.values() for d in v.shape if isinstance(d, str)}
        self._sizes = {symbol: batch if symbol == "B" else tokens for symbol in symbols} | _channels(graph)
        self._last = _head(graph)
        self._plain = {node: self._task(node, {}) for node in graph.nodes}
        self._readers = {node: {*node.inputs, *node.outputs} for node in self._plain}

    def prepare(self, variants: Iterable[Types]) -> None:
        """Look up, or measure, in one go all that the graph takes as it is and with the types of each variant."""
        tasks = [task for task in self._plain.values() if task is not None]
        for changed in variants:
            tasks += [task for node in self.touched(changed) if (task := self._task(node, changed))]
        self.table.add(tasks)

    def touched(self, changed: Types) -> list[Node]:
        """The nodes that read or make one of these values."""
        near = {node for value in changed for node in (*value.users, *([value.node] if value.node else []))}
        return [node for node in near if node in self._plain]

    def seconds(self, changed: Types, nodes: Iterable[Node] | None = None) -> float:
        """What ``nodes``, or all, take when values have the types in ``changed``."""
        return sum(self._node(node, changed) for node in (self._plain if nodes is None else nodes))

    def without(self, passed_by: Mapping[Value, Value]) -> list[Node]:
        """The nodes still needed when each key of ``passed_by`` is replaced by its value."""
        needed: set[Node] = set()
        left = list(self._graph.outputs.values())
        while left:
            value = left.pop()
            while value in passed_by:
                value = passed_by[value]
            if value.node is not None and value.node not in needed:
                needed.add(value.node)
                left += [operand for operand in value.node.inputs if operand is not None]
        return [node for node in self._plain if node in needed]

    def _node(self, node: Node, changed: Types) -> float:
        touched = not changed.keys().isdisjoint(self._readers[node])
        task = self._task(node, changed) if touched else self._plain[node]
        return self.table.of(task) if task is not None else 0.0

    def _task(self, node: Node, changed: Types) -> Task | None:
        sizes = {name: size if name == "B" else 1 for name, size in self._sizes.items()}
        return task_of(node, sizes if node in self._last else self._sizes, changed)


def _channels(graph: Graph) -> dict[str, int]:
    """The axes that convolutions take for channels, such as mel bands, and how many their weights want."""
    found: dict[str, int] = {}
    for node in graph.nodes_named("conv"):
        channels = node.input(0).shape[1]
        if isinstance(channels, str):
            found[channels] = node.input(1).type.static_shape[1] * node.op.all_attrs(node.attrs)["groups"]
    return found


def _head(graph: Graph) -> set[Node]:
    """What makes the logits of a causal model out of the hidden state: the product, and what follows it."""
    found: set[Node] = set()
    value = graph.outputs.get("logits")
    if value is None or not any(node.attr("causal") for node in graph.nodes_named("attention", "latent_attention")):
        return found
    while value.node is not None and value.node.op.name not in ("attention", "latent_attention", "embedding"):
        found.add(value.node)
        if value.node.op.name in ("linear", "matmul"):
            return found
        value = value.node.input(0)
    return set()
