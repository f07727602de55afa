"""What says how much a token matters, from what the attention of its layer has made anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Value
from compiler.ir.types import Dim
from passes.drop_tokens.places import Place

if TYPE_CHECKING:
    from passes.drop_tokens import DropTokens

ROWS = {"class": "first", "last": "last", "received": "all"}
SPREAD, SHIFT = 0.7548776662, 0.5698402910
"""What squares and numbers of places are multiplied by for sines that no order of tokens shows in."""


@dataclass(frozen=True)
class Ops:
    """``ops("mul", x, y)`` appends an operation in ``scope`` before ``anchor``; ``ops.all`` is for several results."""

    graph: Graph
    scope: str
    anchor: Node

    def all(self, name: str, *inputs: Value | None, **attrs: Any) -> Sequence[Value]:
        return self.graph.append(name, inputs, attrs, scope=self.scope, before=self.anchor).outputs

    def __call__(self, name: str, *inputs: Value | None, **attrs: Any) -> Value:
        return self.all(name, *inputs, **attrs)[0]


def scores(ops: Ops, place: Place, options: DropTokens, numbers: Value | None) -> Value:
    """A number [B, T] for each token; those with the largest remain. ``numbers`` [B, T] are their places at first, or
    what they score.

    Of a `learned` score it is the attention that a gate adds to.
    """
    if options.shown and numbers is not None:
        return numbers
    node, wanted = place.attention, None if options.score == "learned" else options.score
    kind = wanted or ("last" if node.attr("causal") else "received")
    query, key = node.input(0), node.input(1)
    if kind == "class" and node.attr("causal"):
        cause = "the first token of a causal model attends to itself alone"
        raise PassError(cause, option="score", remedy="write `score: last` or `received`")
    if kind != "received" and options.every != 1:
        cause = "causal models score by their last token, and `every` is of `received`"
        raise PassError(cause, option="every", remedy="write `score: received`, or leave out `every`")
    if kind in ROWS:
        attrs = {"rows": ROWS[kind], "scale": node.attr("scale"), "causal": node.attr("causal")}
        return ops("token_scores", query, key, **attrs, step=options.every if kind == "received" else 1)
    if kind == "change":
        moved = ops("sub", place.stream, place.attended.stream)
        squares = [ops("mean", ops("mul", value, value), axes=(2,)) for value in (moved, place.stream)]
        return ops("div", *squares)
    if kind == "key-norm":
        squares = ops("sum", ops("mul", key, key), axes=(3,))
        return ops("neg", ops("mean", ops("sqrt", squares), axes=(1,)))
    assert numbers is not None  # of what goes by place
    number = ops("cast", numbers, dtype=torch.float32)
    rows = {"random": lambda: _random(ops, number, options.seed), "earliest": lambda: ops("neg", number)}
    return rows[kind]() if kind in rows else number


def attend(ops: Ops, node: Node, bias: Value) -> None:
    """Let ``bias`` be added to the scores of the attention ``node``."""
    own = node.optional_input(4)
    node.inputs += [None] * (5 - len(node.inputs))
    ops.graph.set_input(node, 4, bias if own is None else ops("add", own, bias))


def by_place(ops: Ops, place: Place) -> Value:
    """0, 1, 2, ... for the tokens of every sample, int64 [B, T]."""
    batch, tokens = place.stream.shape[:2]
    row = ops("reshape", ops("arange", stop=tokens), shape=(1, tokens))
    return ops("expand", row, shape=(batch, tokens))


def _numbers(ops: Ops, tokens: Dim) -> Value:
    return ops("cast", ops("arange", stop=tokens), dtype=torch.float32)


def _spread(ops: Ops, row: Value, place: Place) -> Value:
    """``row`` [T] for every sample."""
    batch, tokens = place.stream.shape[:2]
    return ops("expand", ops("reshape", row, shape=(1, tokens)), shape=(batch, tokens))


def _random(ops: Ops, number: Value, seed: int) -> Value:
    moved = ops("add", number, scalar=float(1 + 17 * seed))
    phase = ops("add", ops("mul", ops("mul", moved, moved), scalar=SPREAD), ops("mul", moved, scalar=SHIFT))
    return ops("sin", phase)


def metric(ops: Ops, place: Place, options: DropTokens) -> Value:
    """What tokens are compared by, [B, T, d]: their keys, the mean over heads, or the stream."""
    if options.compare == "stream":
        return place.stream
    return ops("mean", place.attention.input(1), axes=(1,))


def neighbours(ops: Ops, place: Place, prefix: int, inner: int, runs: int) -> tuple[Value, Value]:
    """``inner`` tokens behind the first ``prefix`` in so many ``runs`` of neighbours, as equal as can be.

    What is 1 for the first of each run and 0 for others, [B, T], and which of the tokens that remain each goes into.
    """
    number = ops("add", _numbers(ops, place.tokens), scalar=float(-prefix))
    own, before = (_run(ops, ops("add", number, scalar=-float(back)), inner, runs) for back in (0, 1))
    first = ops("cast", ops("compare", own, before, relation="ne"), dtype=torch.float32)
    slots = ops("add", own, scalar=float(prefix - 1))
    return _spread(ops, first, place), _spread(ops, slots, place)


def _run(ops: Ops, number: Value, inner: int, runs: int) -> Value:
    """One more than the run of each number; the half keeps divisions clear of whole numbers."""
    shares = ops("div", ops("add", ops("mul", number, scalar=float(runs)), scalar=inner + 0.5), scalar=float(inner))
    return ops("cast", shares, dtype=torch.int64)
