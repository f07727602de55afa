"""A copy of a graph as modules are written from it: positions are an input, and layers own their rotary tables."""

from __future__ import annotations

from backends.torch_module.numbering import close_gaps
from compiler.ir.graph import Graph, Node, Value
from compiler.ir.layers import Layer, layer_of, subgraph
from compiler.ir.positions import given_positions
from compiler.ir.relative import by_position, hoist
from compiler.ir.stages import restore_windows

SHARED_TABLES = 4


def prepared(graph: Graph, tokens: str = "") -> Graph:
    """A copy of ``graph``; for a model that goes on from a cache of ``tokens`` (an input [B, T]) with the further input
    ``position_ids``."""
    copy = _copied(graph)
    close_gaps(copy)
    if tokens:
        restore_windows(copy)
    hoist(copy)
    if tokens:
        by_position(copy, tokens)
        given_positions(copy, tokens)
    _sort_tables(copy)
    _own_tables(copy)
    _join_split_heads(copy)
    copy.prune()
    return copy


def _copied(graph: Graph) -> Graph:
    """``subgraph`` of all nodes, with the graph's own inputs and outputs."""
    nodes = list(graph.nodes)
    copy = subgraph(graph, nodes, graph.name)
    made = {value: other for node, twin in zip(nodes, copy.nodes, strict=True) for value, other in _pairs(node, twin)}
    copy.inputs = {name: copy.inputs.get(name) or Value(name, value.type) for name, value in graph.inputs.items()}
    copy.outputs = {name: made[value] for name, value in graph.outputs.items()}
    return copy


def _pairs(node: Node, twin: Node) -> list[tuple[Value, Value]]:
    return list(zip(node.outputs, twin.outputs, strict=True))


def _sort_tables(graph: Graph) -> None:
    """Rotary tables by the names of their frequencies: some models make them in the order of a set, which varies."""
    tables = graph.nodes_named("rope_table")
    if len({table.input(0) for table in tables}) != 1:
        return
    head = tables[0]
    for table in sorted(tables, key=lambda table: table.input(1).name, reverse=True):
        if table is not head:
            graph.move_before(table, head)
        head = table


def _join_split_heads(graph: Graph) -> None:
    """Heads that are split and put together again have never been apart."""
    for node in graph.nodes_named("merge_heads", "reshape"):
        moved = node.input(0).node
        split = moved.input(0).node if moved is not None and moved.op.name == "transpose" else None
        if split is None or moved is None or split.op.name != "split_heads" or moved.attr("perm") != (0, 2, 1, 3):
            continue
        if node.output.shape == split.input(0).shape:
            graph.replace(node.output, split.input(0))


def _own_tables(graph: Graph) -> None:
    """Where layers rotate by many different tables, each layer gets its own; a few are made once for all layers."""
    tables = {table: layers for table in graph.nodes_named("rope_table") if (layers := _layers(table))}
    layers = {layer for found in tables.values() for layer in found}
    if len(tables) <= 1 or (len(tables) <= SHARED_TABLES and len(tables) < len(layers)):
        return
    for table, found in tables.items():
        for readers in found.values():
            _give(graph, table, readers)


def _layers(table: Node) -> dict[Layer, list[Node]]:
    """The layers that read a table, with the nodes that do; none when something else reads it too."""
    found: dict[Layer | None, list[Node]] = {}
    for node in dict.fromkeys(user for value in table.outputs for user in value.users):
        found.setdefault(layer_of(node.scope), []).append(node)
    return {} if None in found else {layer: nodes for layer, nodes in found.items() if layer is not None}


def _give(graph: Graph, table: Node, readers: list[Node]) -> None:
    """A copy of ``table`` for the nodes of one layer, in the module of the first of them."""
    first = readers[0]
    own = graph.append("rope_table", table.inputs, table.attrs, scope=first.scope, before=first)
    for node in readers:
        for index, value in enumerate(node.inputs):
            if value in table.outputs:
                graph.set_input(node, index, own.outputs[table.outputs.index(value)])
