"""Stages of a causal model whose prompts lose tokens: runs of layers that go on with equally many of them.

A graph computes whole prompts. What goes on from a cache loses none of its tokens: they are no prompt's. So each stage
caches its own tokens, and how many of the new ones it has is a size of its own: of a prompt what the graph says, of
what comes after it all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from compiler.errors import TargetError
from compiler.ir.graph import Graph, Node, Value
from compiler.ir.layers import copy_of, layer_of
from compiler.ir.types import Dim, TensorType, resolve_dim, substituted

PLACES = "position_ids_"  # of a stage that counts its tokens anew


@dataclass(frozen=True)
class Stage:
    """``dim`` names how many new tokens it has, of a prompt ``count`` (of the graph's dims) out of ``before``, which
    ``choice`` says. ``renumbered`` stages count positions anew; ``places`` is the input that then holds them."""

    dim: str
    count: Dim
    before: Dim
    choice: Node
    renumbered: bool
    places: Value | None = None


def named_stages(graph: Graph) -> list[Stage]:
    """Let each stage of ``graph`` have a dim of its own.

    Raises TargetError where tokens are merged or skip an MLP, which no cache can go on from.
    """
    for node in graph.nodes_named("token_match", "token_merge"):
        cause = "tokens that are merged, or matched with others, cannot go on from a cache"
        raise TargetError(cause, where=node.scope, remedy="write `merge: none` and no `score: similarity`")
    for node in graph.nodes_named("token_restore"):
        if layer_of(node.scope) is not None:
            cause = "tokens that skip an MLP are chosen from a whole prompt, which cannot go on from a cache yet"
            raise TargetError(cause, where=node.scope, remedy="leave out `skip`")
    choices = graph.nodes_named("token_select")
    if not choices:
        return []
    counts: list[Dim] = [node.attr("keep") for node in choices]
    if len(set(counts)) < len(counts):
        raise TargetError(
            "tokens that stages choose anew, and as many, cannot go on from a cache", where=choices[-1].scope
        )
    names = {str(count): f"K{number + 1}" for number, count in enumerate(counts)}
    rename_dims(graph, names)
    return [
        Stage(names[str(count)], count, node.input(0).shape[1], node, _renumbered(graph, names[str(count)]))
        for count, node in zip(counts, choices, strict=True)
    ]


def rename_dims(graph: Graph, names: Mapping[str, Dim]) -> None:
    """Let dims of ``graph`` have other names, in attributes and in types."""
    for node in graph.nodes:
        node.attrs = {name: _renamed(node, name, value, names) for name, value in node.attrs.items()}
        types = node.op.infer_types([value and value.type for value in node.inputs], node.attrs, node.scope)
        for value, type in zip(node.outputs, types, strict=True):
            value.type = type


def _renamed(node: Node, name: str, value: object, names: Mapping[str, Dim]) -> object:
    match node.op.attrs[name].kind, value:
        case "dim", str() | int():
            return substituted(value, names)
        case "dims", tuple():
            return tuple(substituted(dim, names) for dim in node.attr(name))
        case _:
            return value


def _renumbered(graph: Graph, dim: str) -> bool:
    """Whether rotary tables of the stage count its tokens anew, or windows do."""
    ropes = [node for node in graph.nodes_named("rope") if node.input(1).shape[1] == dim]
    makers = [node.input(1).node for node in ropes]
    return any(maker is not None and maker.op.name == "slice" for maker in makers)


def restore_windows(graph: Graph) -> None:
    """Let attention whose bias says what lies in a window of places have that window instead: caches know places."""
    for node in graph.nodes_named("attention"):
        bias = node.optional_input(4)
        window = _window_of(bias) if bias is not None else 0
        if window:
            graph.set_input(node, 4, None)
            node.attrs = node.op.normalise_attrs({**node.attrs, "window": window})
    graph.prune()


def shows_window(bias: Value) -> bool:
    """Whether ``bias`` only says what lies in a window of places."""
    return _window_of(bias) > 0


def _window_of(bias: Value) -> int:
    """How wide a window of places ``bias`` shows, 0 when it shows none: (near - 1) * much, near of how far apart two
    tokens stand."""
    node = bias.node
    while node is not None and node.op.name == "token_take":
        node = node.input(0).node
    chain: list[Node] = []
    for name in ("mul", "sub", "cast", "compare"):
        if node is None or node.op.name != name or len(node.inputs) != 1:
            return 0
        chain.append(node)
        node = node.input(0).node
    apart = node is not None and node.op.name in ("sub", "abs") and node.output.type.dtype == torch.int64
    return int(chain[-1].attr("scalar")) if apart else 0


def own_places(graph: Graph, stages: list[Stage]) -> list[Stage]:
    """Give stages that count positions anew an input for them, of which their rotary tables are made.

    Positions of ``graph`` are given by now: what is made of them differs from sample to sample.
    """
    rename_dims(graph, {})
    return [_with_places(graph, stage) if stage.renumbered else stage for stage in stages]


def _with_places(graph: Graph, stage: Stage) -> Stage:
    batch = stage.choice.input(0).shape[0]
    places = graph.add_input(f"{PLACES}{stage.dim}", TensorType(torch.int64, (batch, stage.dim)))
    made: dict[Node, Node] = {}
    for node in graph.nodes_named("rope"):
        for index in (1, 2):
            value = node.input(index)
            source = _source(value) if value.shape[1] == stage.dim else None
            if source is None or source.node is None:
                continue
            if source.node not in made:
                inputs, scope = [places, *source.node.inputs[1:]], source.node.scope
                made[source.node] = graph.append("rope_table", inputs, source.node.attrs, scope=scope, before=node)
            graph.set_input(node, index, made[source.node].outputs[source.node.outputs.index(source)])
    graph.prune()
    return Stage(stage.dim, stage.count, stage.before, stage.choice, True, places)


def _source(value: Value) -> Value | None:
    """The whole table that ``value`` is a part of."""
    while value.node is not None and value.node.op.name in ("slice", "token_take"):
        value = value.node.input(0)
    return value if value.node is not None and value.node.op.name == "rope_table" else None


def after_prompt(graph: Graph, prompt: int) -> Graph:
    """A copy of ``graph`` whose first ``prompt`` tokens are the prompt, and whose others come after it: what a cache
    gives token by token, in one piece. No token after the prompt is dropped, nor counts in what is."""
    copy = copy_of(graph)
    stages = named_stages(copy)
    if not stages:
        return copy
    tokens = str(stages[0].before)
    sizes = {tokens: prompt, **{stage.dim: resolve_dim(stage.count, {tokens: prompt}) for stage in stages}}
    for stage in stages:
        _choose_of_prompt(copy, stage, sizes)
    rename_dims(copy, {stage.dim: f"{tokens}-{prompt - sizes[stage.dim]}" for stage in stages})
    return copy


def scored(value: Value) -> Node | None:
    """The node that says what attention the tokens get that ``value`` [B, T] scores, if it comes of that."""
    while value.node is not None and value.node.op.name in ("add", "log", "token_blocks"):
        value = value.node.input(0)
    return value.node if value.node is not None and value.node.op.name == "token_scores" else None


def _score_prompt(graph: Graph, node: Node, place: int, own: int) -> None:
    """Let the operand of ``node`` at ``place``, scores of tokens, be those of the first ``own`` among themselves."""
    value = node.input(place)
    if value.node is not None and scored(value) is value.node:
        for index in range(2):
            made = value.node
            part = graph.op("slice", [made.input(index)], {"axis": 2, "stop": own}, scope=made.scope, before=made)
            graph.set_input(made, index, part)
    elif value.node is not None and (value.node.op.name == "token_blocks" or scored(value) is not None):
        for index in range(len(value.node.inputs)):
            _score_prompt(graph, value.node, index, own)
    else:
        part = graph.op("slice", [value], {"axis": 1, "stop": own}, scope=node.scope, before=node)
        graph.set_input(node, place, part)


def _choose_of_prompt(graph: Graph, stage: Stage, sizes: Mapping[str, int]) -> None:
    """Let the choice be of the prompt's tokens, and all that come after go on too."""
    node, own = stage.choice, sizes[str(stage.before)]
    _score_prompt(graph, node, 0, own)
    following = node.following
    assert following is not None  # a choice has readers
    batch, readers = node.outputs[0].shape[0], list(node.outputs[0].users)
    node.attrs = node.op.normalise_attrs({**node.attrs, "keep": sizes[stage.dim]})
    later = graph.op("arange", [], {"start": own, "stop": stage.before}, scope=node.scope, before=following)
    count = later.shape[0]
    row = graph.op("reshape", [later], {"shape": (1, count)}, scope=node.scope, before=following)
    rows = graph.op("expand", [row], {"shape": (batch, count)}, scope=node.scope, before=following)
    whole = graph.op("concat", [node.outputs[0], rows], {"axis": 1}, scope=node.scope, before=following)
    for reader in readers:
        for index, value in enumerate(reader.inputs):
            if value is node.outputs[0]:
                graph.set_input(reader, index, whole)
