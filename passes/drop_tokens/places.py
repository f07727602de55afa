"""Where tokens can be dropped: the residual stream behind the attention of a layer, and behind the layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from compiler.errors import PassError
from compiler.ir.facts import AttentionSite, attention_sites
from compiler.ir.graph import Graph, Node, Param, Value, ancestors
from compiler.ir.layers import Layer, layer_of
from compiler.ir.sites import static
from compiler.ir.types import Dim

NORMS = ("layer_norm", "rms_norm")


@dataclass(frozen=True)
class Sum:
    """An `add` of the stream, its operand at ``place``, and of what a sublayer makes of it."""

    node: Node
    place: int

    @property
    def stream(self) -> Value:
        return self.node.input(self.place)

    @property
    def made(self) -> Value:
        return self.node.input(1 - self.place)


@dataclass(frozen=True)
class Place:
    """A layer, its attention, the stream [B, T, D] behind that, behind the layer or before it, and the sum behind
    attention."""

    layer: Layer
    attention: Node
    stream: Value
    attended: Sum

    @property
    def tokens(self) -> Dim:
        return self.stream.shape[1]

    def mlp(self) -> Sum | None:
        """The sum behind what the layer makes of the stream, if that is behind attention: its MLP."""
        return _residual(self.stream, self.layer)


def places(graph: Graph, layers: str | None, site: str, stack: str | None = None) -> list[Place]:
    """The places of the model's first stack of layers that attend to themselves; of all, or those in ``layers``.

    They are behind ``site``: the `attention` or the `layer`, or at its `entry`.
    ``stack`` is a part of the module path of the stack. Raises PassError when there are none, or ``layers`` names one
    that there is not.
    """
    found = [place for each in attention_sites(graph) if (place := _place(each, site)) is not None]
    stacks = list(dict.fromkeys(place.layer.stack for place in found))
    if stack is not None and stacks:
        named = [path for path in stacks if stack in path.split(".") or stack == path]
        if len(named) != 1:
            cause = f"`{stack}` names {len(named)} of the stacks of layers, which are {', '.join(stacks)}"
            raise PassError(cause, option="stack", remedy="name one of them by its path")
        stacks = named
    found = [place for place in found if place.layer.stack == stacks[0]]
    if not found:
        raise PassError(
            "the model has no layers with attention of tokens to each other, with keys of their own",
            remedy="leave `drop-tokens` out for this model",
        )
    if layers is None:
        return found
    wanted = _numbers(layers)
    missing = wanted - {place.layer.index for place in found}
    if missing:
        raise PassError(
            f"{stacks[0]} has no attention in layer {min(missing)}", option="layers", remedy="layers count from 0"
        )
    return [place for place in found if place.layer.index in wanted]


def _numbers(layers: str) -> set[int]:
    chosen: set[int] = set()
    for part in layers.split(","):
        span = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if span is None:
            raise PassError(
                f"`layers` must be like 0-11,20, not `{layers}`", option="layers", remedy='write `layers: "0-11,20"`'
            )
        chosen.update(range(int(span[1]), int(span[2] or span[1]) + 1))
    return chosen


def _place(site: AttentionSite, where: str) -> Place | None:
    layer = layer_of(site.scope)
    if layer is None or not site.attends_itself:
        return None
    attended = _residual(site.node.output, layer)
    if attended is None:
        return None
    stream = _normed(attended.node.output, layer)
    if where == "entry":
        return Place(layer, site.node, attended.stream, attended)
    behind = _residual(stream, layer) if where == "layer" else None
    return Place(layer, site.node, _normed(behind.node.output, layer) if behind else stream, attended)


def _residual(value: Value, layer: Layer) -> Sum | None:
    """The sum in ``layer`` of what comes of ``value`` and what it came of."""
    before, reached = {value, *_above(value)}, {value}
    node = value.node.following if value.node else None
    while node is not None and layer_of(node.scope) == layer:
        if reached.intersection(v for v in node.inputs if v is not None):
            made = [v for v in node.inputs if v is not None and not isinstance(v, Param)]
            came = [place for place, v in enumerate(made) if v in before]
            if node.op.name == "add" and len(made) == 2 and came and _is_stream(node.output):
                return Sum(node, came[0])
            reached.update(node.outputs)
        node = node.following
    return None


def _is_stream(value: Value) -> bool:
    return value.type.rank == 3


def _above(value: Value) -> set[Value]:
    return {v for node in ancestors([value]) for v in (*node.inputs, *node.outputs) if v is not None}


def _normed(value: Value, layer: Layer) -> Value:
    """The norm of ``value``, if only that is read."""
    user = value.single_user()
    norm = user is not None and user.op.name in NORMS and layer_of(user.scope) == layer
    return user.output if user is not None and norm else value


def ends(graph: Graph, place: Place) -> tuple[int, int]:
    """How many tokens at the start and at the end remain by default."""
    if isinstance(place.tokens, str):
        return 1, int(place.attention.attr("causal"))
    return _learnt(graph, place.stream, set()), 0


def _learnt(graph: Graph, value: Value, seen: set[Value]) -> int:
    """How many of the first tokens of ``value`` [B, T, D] are made of weights alone."""
    node = value.node
    if node is None or value in seen:
        return 0
    seen.add(value)
    if not any(isinstance(dim, int) and dim > 1 for dim in value.shape[:2]) and not _given(graph, value):
        return 1
    match node.op.name:
        case "concat" if node.attr("axis") == 1:
            return _leading(graph, node, seen)
        case "slice" if node.attr("axis") == 1:
            stop = node.attr("stop")
            found = _learnt(graph, node.input(0), seen) if node.attr("start") == 0 else 0
            return min(found, stop) if isinstance(stop, int) else found
        case _:
            streams = [v for v in node.inputs if v is not None and not isinstance(v, Param) and v.shape == value.shape]
            return max((_learnt(graph, v, seen) for v in streams), default=0)


def _leading(graph: Graph, node: Node, seen: set[Value]) -> int:
    count = 0
    for part in node.inputs:
        assert part is not None  # joined ones have all their operands
        size = static(part.shape[1])
        own = size if not _given(graph, part) else _learnt(graph, part, seen)
        count += own
        if own < size:
            break
    return count


def _given(graph: Graph, value: Value) -> bool:
    """Whether ``value`` depends on an input."""
    inputs: Sequence[Value] = list(graph.inputs.values())
    return value in inputs or any(v in inputs for node in ancestors([value]) for v in node.inputs if v is not None)
