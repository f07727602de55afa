"""Which values are token positions: found by computing them, since families count them in different ways."""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.ir.execute import run
from compiler.ir.graph import Graph, Param, Value, ancestors
from compiler.ir.layers import subgraph
from compiler.ir.types import TensorType

POSITIONS = "position_ids"
SIZES = ((2, 5), (3, 8))
MAKERS = frozenset({"arange", "full", "reshape", "expand", "cumsum", "sub", "add", "cast", "transpose"})


def given_positions(graph: Graph, tokens: str) -> Value:
    """Make token positions an input ``position_ids`` [B, T] of ``graph``, like the input ``tokens``, and return it."""
    counted = positions(graph, tokens)
    given = graph.add_input(POSITIONS, TensorType(torch.int64, graph.inputs[tokens].shape))
    for value in counted:
        _take_over(graph, value, given)
    return given


def _take_over(graph: Graph, counted: Value, given: Value) -> None:
    """Let ``given`` [B, T] stand for ``counted``; what picks rows by [T] picks them for every sample then."""
    if counted.type.rank > 1:
        graph.replace(counted, given)
        return
    for user in list(counted.users):
        picked = graph.op(user.op.name, [user.input(0), given], user.attrs, scope=user.scope, before=user)
        graph.replace(user.output, picked)


def positions(graph: Graph, tokens: str) -> set[Value]:
    """The int64 values [B, T] or [1, T] that hold 0, 1, 2, ... in every row, whatever B and T are, and those [T] that
    pick rows of tables.

    ``tokens`` names an input [B, T], whose shape the others follow.
    """
    batch, length = graph.inputs[tokens].shape
    constant: set[Value] = set()
    found: set[Value] = set()
    for node in graph.nodes:
        if node.op.name in MAKERS and all(value in constant for value in node.inputs):
            constant.update(node.outputs)
            shapes = ((batch, length), (1, length), *([(length,)] if _picks(node.output) else []))
            if node.output.type.dtype == torch.int64 and node.output.shape in shapes:
                found |= {node.output} if _counts(graph, node.output, tokens) else set()
    return found


def longest(graph: Graph, tokens: str, ids: Tensor) -> int:
    """How many of the tokens ``ids`` [B, T], the input ``tokens``, tables of positions have rows for: T, or fewer.

    Tables are those that are read by numbers worked out from the tokens, without another weight.
    """
    length = ids.shape[1]
    for node in graph.nodes_named("embedding"):
        made = ancestors([node.input(1)])
        if made and not any(isinstance(value, Param) for each in made for value in each.inputs):
            rows = node.input(0).type.static_shape[0]
            most = int(run(_made_of(graph, node.input(1), tokens), {tokens: ids})["y"].max())
            length = min(length, ids.shape[1] + rows - 1 - most)
    return length


def _picks(value: Value) -> bool:
    """Whether ``value`` does nothing but pick rows of tables."""
    return bool(value.users) and all(
        user.op.name in ("embedding", "take") and user.input(1) is value and not user.attrs.get("axis", 0)
        for user in value.users
    )


def _counts(graph: Graph, value: Value, tokens: str) -> bool:
    """Whether ``value`` counts the tokens, at two sizes of the input."""
    part = _made_of(graph, value, tokens)
    for batch, length in SIZES:
        given = {tokens: torch.zeros(batch, length, dtype=graph.inputs[tokens].type.dtype)}
        made: Tensor = run(part, given)["y"]
        if not torch.equal(made, torch.arange(length).expand_as(made)):
            return False
    return True


def _made_of(graph: Graph, value: Value, tokens: str) -> Graph:
    """What makes ``value``, as a graph of its own with the input ``tokens`` and the output ``y``."""
    needed = set(ancestors([value]))
    nodes = [node for node in graph.nodes if node in needed]
    part = subgraph(graph, nodes, "positions")
    part.outputs = {"y": list(part.nodes)[-1].output}  # the last of its ancestors is what makes it
    if tokens not in part.inputs:
        part.add_input(tokens, graph.inputs[tokens].type)
    return part
