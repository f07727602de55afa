"""Whole layers: which there are, what the model loses without each, and how one is taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from compiler.fidelity import Fidelity
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import copy_of, segments
from compiler.pipeline import Context
from compiler.removal import stream_of


@dataclass(frozen=True)
class Block:
    """A layer that adds to the residual stream: without it, the stream goes on as it ``enters``."""

    scope: str
    enters: Value
    leaves: Value
    params: frozenset[Param]


def blocks_of(graph: Graph, ctx: Context) -> list[Block]:
    """The layers that can be taken out; of the others the reason is reported."""
    found: list[Block] = []
    for layer, nodes in segments(graph):
        if layer is None:
            continue
        block = _block(layer.scope, nodes, set(graph.outputs.values()))
        if isinstance(block, str):
            ctx.skipped(layer.scope, f"cannot be taken out: {block}")
        else:
            found.append(block)
    return found


def _block(scope: str, nodes: Sequence[Node], outputs: set[Value]) -> Block | str:
    inside = set(nodes)
    made = [value for node in nodes for value in node.outputs]
    used = [value for value in made if value in outputs or not value.users.keys() <= inside]
    if len(used) != 1:
        return f"{len(used)} of its values are used after it"
    stream = used[0]
    while stream.node is not None and stream.node in inside:
        if stream.node.op.name != "add" or len(stream.node.inputs) != 2:
            return f"`{stream.node.op.name}` stands in the residual stream"
        stream = stream_of(stream.node)
    own = {v for node in nodes for v in node.inputs if isinstance(v, Param) and v.users.keys() <= inside}
    return Block(scope, stream, used[0], frozenset(own))


def losses(graph: Graph, blocks: Sequence[Block], batches: Sequence[Mapping[str, Tensor]]) -> dict[Block, float]:
    """How far from the original the model is without each block, in the units of ``compiler.fidelity``."""
    fidelity = Fidelity(graph, batches)
    return {block: fidelity.distance(_without(graph, block)) for block in blocks}


def _without(graph: Graph, block: Block) -> Graph:
    trial = copy_of(graph)
    pairs = {
        ours: theirs
        for a, b in zip(graph.nodes, trial.nodes, strict=True)
        for ours, theirs in zip(a.outputs, b.outputs, strict=True)
    }
    pairs.update(zip(graph.inputs.values(), trial.inputs.values(), strict=True))
    trial.replace(pairs[block.leaves], pairs[block.enters])
    trial.prune()
    return trial


def take_out(graph: Graph, blocks: Sequence[Block]) -> None:
    """Let the stream pass ``blocks`` by."""
    for block in blocks:
        enters = block.enters
        while (removed := next((b for b in blocks if b.leaves is enters), None)) is not None:
            enters = removed.enters
        graph.replace(block.leaves, enters)
    graph.prune()
