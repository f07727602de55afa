"""Whole layers and parts of them: which there are, what the model loses without each, and how one is taken out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from compiler.calibration.fidelity import Fidelity
from compiler.calibration.sweep import sweep
from compiler.ir.graph import Graph, Node, Param, Value, ancestors
from compiler.ir.layers import copy_of, segments
from compiler.pipeline import Context
from compiler.rewrite.removal import stream_of


@dataclass(frozen=True)
class Block:
    """A layer, or a part of one, that adds to the stream: without it, the stream goes on as it ``enters``."""

    scope: str
    enters: Value
    leaves: Value
    params: frozenset[Param]


def blocks_of(graph: Graph, ctx: Context, kinds: Sequence[str]) -> list[Block]:
    """The layers or sublayers in ``kinds`` that can be taken out; of the others the reason is reported."""
    found: list[Block] = []
    if "sublayers" in kinds:
        found += [block for layer, nodes in segments(graph) if layer for block in _parts(graph, nodes)]
    if "layers" not in kinds:
        return found
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


def _parts(graph: Graph, nodes: Sequence[Node]) -> Iterator[Block]:
    """The branches of a layer whose results are added to the stream that they read."""
    inside = set(nodes)
    for node in nodes:
        if node.op.name != "add" or len(node.inputs) != 2 or any(isinstance(v, Param) for v in node.inputs):
            continue
        stream = stream_of(node)
        (branch,) = [value for value in node.inputs if value is not stream and value is not None] or [stream]
        if branch is stream:
            continue
        own = (set(ancestors([branch])) & inside) - set(ancestors([stream]))
        params = {v for n in own for v in n.inputs if isinstance(v, Param) and v.users.keys() <= own}
        if stream.node not in own and any(p.type.rank > 1 for p in params) and _reads(own, stream):
            yield Block(_common([n.scope for n in own if {*n.inputs} & params]), stream, node.output, frozenset(params))


def _reads(nodes: set[Node], value: Value) -> bool:
    return any(node in nodes for node in value.users)


def _common(scopes: Sequence[str]) -> str:
    """The longest module path that most of ``scopes`` lie below: that of the matrices, norms may lie beside it."""
    parents = [scope.rpartition(".")[0] for scope in scopes]
    return max(sorted(set(parents)), key=lambda parent: (parents.count(parent), len(parent)))


def influences(graph: Graph, blocks: Sequence[Block], batches: Sequence[Mapping[str, Tensor]]) -> dict[Block, float]:
    """How far each block turns the stream: 1 - cos(what enters, what leaves), the mean over tokens (ShortGPT, arXiv
    2403.03853).
    """
    found: dict[Block, float] = {}
    for stage in sweep(graph, batches):
        for block in (block for block in blocks if block.leaves.node in set(stage.nodes)):
            pairs = stage.values([block.enters, block.leaves])
            angles = [1 - cosine_similarity(v[block.enters], v[block.leaves], dim=-1).mean() for v in pairs]
            found[block] = float(torch.stack(angles).mean())
    return found


def losses(graph: Graph, blocks: Sequence[Block], batches: Sequence[Mapping[str, Tensor]]) -> dict[Block, float]:
    """How far from the original the model is without each block, in the units of ``compiler.calibration.fidelity``."""
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
