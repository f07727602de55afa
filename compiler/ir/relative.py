"""Biases on the scores of cached attention: what depends on how far apart tokens are, for some queries and all keys.

A graph makes a bias [.., T, T] for all of T tokens at once. Going on from a cache takes T rows of it, one for each new
token, and a column for each token there is. The rows follow from ``query_positions`` and the columns from
``key_positions``, two inputs that the graph gets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiler.errors import TargetError
from compiler.ir.execute import run
from compiler.ir.graph import Graph, Node, Param, Value, ancestors
from compiler.ir.layers import layer_of, subgraph
from compiler.ir.types import Dim, TensorType

QUERIES, KEYS = "query_positions", "key_positions"
COLUMNS = "keys"  # how many tokens there are, with those in the cache
SIZES = ((5, 2), (9, 9), (14, 1))  # tokens there are, and those of them that are new


def biases(graph: Graph, *, causal: bool) -> list[Value]:
    """What is added to scores by attention that is causal, or by attention that is not."""
    found = [node.optional_input(4) for node in graph.nodes_named("attention") if node.attr("causal") == causal]
    return list(dict.fromkeys(value for value in found if value is not None))


def by_position(graph: Graph, tokens: str) -> None:
    """Make the biases of causal attention from positions of queries and keys. ``tokens`` is an input [B, T].

    Raises TargetError for a bias that depends on more than positions.
    """
    found = biases(graph, causal=True)
    if not found:
        return
    length = graph.inputs[tokens].shape[1]
    queries = graph.add_input(QUERIES, TensorType(torch.int64, (length,)))
    keys = graph.add_input(KEYS, TensorType(torch.int64, (COLUMNS,)))
    for bias in found:
        copied = _copied(graph, bias, length, queries, keys)
        if not all(_alike(graph, old, new, tokens) for old, new in _read_by_weights(copied)):
            raise TargetError("attention with a bias that is no function of positions cannot go on from a cache")
        graph.replace(bias, copied[bias])
    graph.prune()


def hoist(graph: Graph) -> None:
    """Let what one layer makes for all of them, from nothing that is given, stand before the stack."""
    given = set(graph.inputs.values())
    for bias in (*biases(graph, causal=True), *biases(graph, causal=False)):
        readers, made = {layer_of(user.scope) for user in bias.users}, ancestors([bias])
        shared = len(readers) > 1 and not any(value in given for node in made for value in node.inputs)
        for node in made if shared else ():
            layer = layer_of(node.scope)
            if layer is not None:
                node.scope = layer.stack.rpartition(".")[0]


def _copied(graph: Graph, bias: Value, length: Dim, queries: Value, keys: Value) -> dict[Value, Value]:
    """From what makes ``bias`` to the same for some queries and all keys."""
    needed, new = set(ancestors([bias])), dict[Value, Value]()
    for node in [node for node in graph.nodes if node in needed]:
        shape = node.output.shape
        if node.op.name == "arange":
            new[node.output] = node.output
        elif node.op.name == "reshape" and _counts(node) and shape in ((length, 1), (1, length)):
            source, axes = (queries, (length, 1)) if shape[1] == 1 else (keys, (1, COLUMNS))
            new[node.output] = graph.op("reshape", [source], {"shape": axes}, scope=node.scope, before=node)
        else:
            inputs = [value if value is None or isinstance(value, Param) else new[value] for value in node.inputs]
            attrs = {name: _attribute(value, length) for name, value in node.attrs.items()}
            new[node.output] = graph.op(node.op.name, inputs, attrs, scope=node.scope, before=node)
    return new


def _counts(node: Node) -> bool:
    maker = node.input(0).node
    return maker is not None and maker.op.name == "arange"


def _attribute(value: Any, length: Dim) -> Any:
    """A shape of queries and keys: the second length of two is that of the keys."""
    if not isinstance(value, tuple) or value.count(length) != 2:
        return value
    second = len(value) - 1 - value[::-1].index(length)
    return (*value[:second], COLUMNS, *value[second + 1 :])


def _read_by_weights(copied: dict[Value, Value]) -> list[tuple[Value, Value]]:
    """The values that are looked up in weights, as they were and as they are: those can be computed without any."""
    makers = [value.node for value in copied if value.node is not None]
    readers = [node for node in makers if any(isinstance(value, Param) for value in node.inputs)]
    read = [value for node in readers for value in node.inputs if value in copied]
    return [(value, copied[value]) for value in read]


def _alike(graph: Graph, old: Value, new: Value, tokens: str) -> bool:
    """Whether ``new`` has the last rows of ``old``, at several sizes."""
    for keys, queries in SIZES:
        whole = _computed(graph, old, {tokens: torch.zeros(1, keys, dtype=torch.int64)})
        places = torch.arange(keys)
        if not torch.equal(_computed(graph, new, {QUERIES: places[-queries:], KEYS: places}), whole[-queries:]):
            return False
    return True


def _computed(graph: Graph, value: Value, given: dict[str, Tensor]) -> Tensor:
    needed = set(ancestors([value]))
    nodes = [node for node in graph.nodes if node in needed]
    part = subgraph(graph, nodes, "bias")
    for name in given:
        if name not in part.inputs:
            part.add_input(name, graph.inputs[name].type)
    part.outputs = {"y": list(part.nodes)[-1].output}
    return run(part, given)["y"]
