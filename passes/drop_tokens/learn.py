"""Training the gates that say which tokens remain, in a graph where none leaves but the others are attended to less.

Of token j with score s_j a layer keeps g_j = sigmoid((s_j - t) / T), t the highest score among those that would leave.
Every attention from there on has the logarithm of the product of all g so far added to the scores of key j, and behind
the last layer the token is x_j + g_j (y_j - x_j), where x_j is what it was and y_j what it became.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibration.distil.job import Job, key_of
from compiler.calibration.distil.whole import distil
from compiler.calibration.distil.windows import divide
from compiler.calibration.fidelity import Fidelity
from compiler.errors import PassError
from compiler.ir.facts import attention_sites
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import copy_of, layer_of
from compiler.ir.types import Dim, canonical_dim
from compiler.pipeline import Context
from compiler.weights.expr import Expr
from passes.drop_tokens.follow import Readers
from passes.drop_tokens.gate import NAME, add_gate, remove_gates
from passes.drop_tokens.places import Place, places
from passes.drop_tokens.scores import Ops, attend, scores

if TYPE_CHECKING:
    from passes.drop_tokens import DropTokens

SOFTNESS = 0.25
"""T above: over how much of a score, in nats of attention, a token goes from staying to leaving."""
RATE = 0.02
LEAST = 1e-6
FAR = 1e4


@dataclass(frozen=True)
class Step:
    """Behind ``place`` ``count`` tokens remain: a ``share`` [B, T] of each stays there, and ``left`` of all before."""

    place: Place
    count: Dim
    share: Value
    left: Value


@dataclass(frozen=True)
class Learning:
    """``whole`` is the graph before tokens are dropped, ``soft`` what is trained in its place."""

    whole: Graph
    soft: Graph

    def train(self, graph: Graph, ctx: Context, options: DropTokens, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Let the gates of ``graph``, which drops tokens, be trained on ``batches`` (inputs by name) if such gates are
        better than none on windows held out of them.

        Raises PassError where there is too little calibration data.
        """
        gates = [param for name, param in graph.params.items() if f".{NAME}." in name]
        if not gates:
            return
        windows = divide(batches)
        means = options.of == "means"
        fidelity = Fidelity(self.whole, windows.held, means=means)
        plain = copy_of(graph)
        remove_gates(plain)
        before = fidelity.distance(plain)
        key = key_of(gates, "gates", options)
        soft = [self.soft.params[param.name] for param in gates]
        job = Job(self.soft, self.whole, ctx, soft, windows, RATE, options.seed, key, means)
        exprs, seen = distil(job, 0, options.learn)
        untrained = _exchanged(gates, {param.name: expr for param, expr in exprs.items()})
        after = fidelity.distance(graph)
        ctx.tried("by attention alone", before, after >= before)
        ctx.tried("by trained gates", after, after < before)
        if after < before:
            ctx.rewrote("", f"{len(gates) // 2} gates trained", tokens=seen)
            return
        _exchanged(gates, untrained)
        remove_gates(graph)
        far = f"held-out windows were {before:.4g} from the original without them and {after:.4g} with them"
        ctx.skipped("", f"trained gates are left out: {far}")


def _exchanged(params: Sequence[Param], exprs: Mapping[str, Expr]) -> dict[str, Expr]:
    """Give ``params`` other values; what they had."""
    before = {param.name: param.expr for param in params}
    for param in params:
        param.expr = exprs[param.name]
    return before


def learning(graph: Graph, ctx: Context, options: DropTokens, keep: Sequence[Dim], ends: tuple[int, int]) -> Learning:
    """What trains the gates of ``graph``, which drops nothing yet and is to ``keep`` so many tokens at each place.

    The first and last of ``ends`` always remain. Raises PassError where means of logits are to be compared.
    """
    if options.of == "means" and next(iter(graph.outputs)) == "logits":
        raise PassError(
            "the model gives logits, whose means over tokens nobody reads", option="of", remedy="leave out `of`"
        )
    soft = copy_of(graph)
    found = places(soft, options.layers, options.site, options.stack)
    order = {node: number for number, node in enumerate(soft.nodes)}
    left = _exits(soft, found[0])
    steps: list[Step] = []
    for place, count in zip(found, keep, strict=True):
        before = steps[-1].count if steps else place.tokens
        if count != before:
            steps.append(_step(soft, ctx, options, place, count, ends, steps[-1] if steps else None))
    for value in left:
        _blend(soft, value, [step for step in steps if order[_maker(step.place.stream)] < order[_maker(value)]])
    _attend(soft, steps)
    return Learning(copy_of(graph), soft)


def _step(
    graph: Graph, ctx: Context, options: DropTokens, place: Place, count: Dim, ends: tuple[int, int], last: Step | None
) -> Step:
    """Let a gate say what of each token stays behind ``place``, beside what does after the ``last`` one."""
    first = _maker(place.stream).following
    assert first is not None  # a stream has readers
    ops = Ops(graph, place.layer.scope, first)
    gate = add_gate(graph, ctx.spill, place, options.seed)
    own = gate.scores(ops, place.stream, scores(ops, place, options, None))
    if options.block > 1:
        own = ops("token_blocks", own, size=options.block)
    if last is not None:
        own = ops("add", own, _log(ops, last.left))
    own = ops("add", own, _high(ops, place, ends))
    _, rest = ops.all("token_select", own, keep=count)
    least = ops("full", shape=(own.shape[0], 1), value=-FAR)  # where none leaves, every share is 1
    most = ops("max", ops("concat", ops("token_take", own, rest), least, axis=1), axes=(1,), keep=True)
    share = ops("sigmoid", ops("mul", ops("sub", own, most), scalar=1 / SOFTNESS))
    return Step(place, count, share, share if last is None else ops("mul", share, last.left))


def _high(ops: Ops, place: Place, ends: tuple[int, int]) -> Value:
    """What is added to scores [B, T] so that the first and last tokens have the highest, [1, T]."""
    tokens, (prefix, suffix) = place.tokens, ends
    first = ops("compare", ops("arange", stop=tokens), relation="lt", scalar=float(prefix))
    places = ops("arange", start=canonical_dim(f"{suffix}-({tokens})"), stop=suffix)
    last = ops("compare", places, relation="ge", scalar=0.0)
    flags = [ops("cast", each, dtype=torch.float32) for each in (first, last)]
    return ops("reshape", ops("mul", ops("add", *flags), scalar=FAR), shape=(1, tokens))


def _log(ops: Ops, share: Value) -> Value:
    return ops("log", ops("add", share, scalar=LEAST))


def _maker(value: Value) -> Node:
    assert value.node is not None  # streams are computed
    return value.node


def _exits(graph: Graph, place: Place) -> list[Value]:
    """The values of all tokens that something behind the layers reads."""
    inside = [node for node in graph.nodes if node.scope.startswith(f"{place.layer.stack}.")]
    made = [value for node in inside for value in node.outputs if value.type == place.stream.type]
    return [value for value in made if Readers.of(graph, place.layer.stack, value).any]


def _blend(graph: Graph, value: Value, steps: Sequence[Step]) -> None:
    """Let what reads ``value`` behind the layers have of each token what stays, and what it was when the rest left."""
    if not steps:
        return
    stack, anchor = steps[0].place.layer.stack, _maker(value).following
    assert anchor is not None  # it has readers
    readers = Readers.of(graph, stack, value)
    ops = Ops(graph, stack.rpartition(".")[0], anchor)
    for step in reversed(steps):
        stream = step.place.stream
        share = ops("reshape", step.share, shape=(*stream.shape[:2], 1))
        value = ops("add", stream, ops("mul", share, ops("sub", value, stream)))
    readers.read(graph, value)


def _attend(graph: Graph, steps: Sequence[Step]) -> None:
    """Let attention behind each step see of keys what is left of their tokens."""
    for site in attention_sites(graph):
        layer = layer_of(site.scope)
        behind = [step for step in steps if layer and layer.stack == step.place.layer.stack and site.attends_itself]
        behind = [step for step in behind if layer and step.place.layer.index < layer.index]
        if behind:
            ops, left = Ops(graph, site.scope, site.node), behind[-1].left
            batch, tokens = left.shape
            attend(ops, site.node, ops("reshape", _log(ops, left), shape=(batch, 1, 1, tokens)))
