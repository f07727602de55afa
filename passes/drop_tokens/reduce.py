"""Drop tokens at each place: which remain, what becomes of the others, and what follows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Value
from compiler.ir.ops.tokens import mergeable
from compiler.ir.types import Dim
from compiler.pipeline import Context
from passes.drop_tokens.counts import counts, paired
from passes.drop_tokens.follow import LATER, Following, Readers
from passes.drop_tokens.gate import add_gate
from passes.drop_tokens.learn import learning
from passes.drop_tokens.pictures import Pictures, pictures
from passes.drop_tokens.places import Place, ends, places
from passes.drop_tokens.scores import Ops, attend, by_place, metric, neighbours, scores
from passes.drop_tokens.words import Words, words

if TYPE_CHECKING:
    from passes.drop_tokens import DropTokens

FATES = {
    "none": "dropped",
    "extra": "merged into one",
    "bipartite": "merged into others",
    "average": "merged in runs",
    "words": "merged with those of their words",
}


@dataclass(frozen=True)
class Chosen:
    """The places of tokens that remain; of the others, and which of those that remain each goes into. ``weight`` is
    what they count for in the one token that they make."""

    index: Value
    rest: Value | None = None
    into: Value | None = None
    weight: Value | None = None


@dataclass
class Reduction:
    """``sizes`` [B, K] is of how many tokens each is the mean by now, ``sized`` that of an attention's keys, and
    ``numbers`` [B, K] are what scores go by that tokens have from the first: their places, or what class tokens of
    pictures attend to. With ``pictures`` only tokens of these can go."""

    graph: Graph
    options: DropTokens
    prefix: int
    suffix: int
    ctx: Context
    sizes: Value | None = None
    sized: dict[Node, Value] = field(default_factory=dict[Node, Value])
    numbers: Value | None = None
    pictures: Pictures | None = None

    def drop(self, place: Place, keep: Dim) -> None:
        """Let ``keep`` tokens remain. Raises PassError when something behind ``place`` needs every token."""
        stream = place.stream
        if stream.node is None or stream.node.following is None:
            raise PassError(
                f"what {place.layer.scope} begins with is an input of the model",
                option="site",
                remedy="leave this layer out of `layers`",
            )
        first = stream.node.following
        ops = Ops(self.graph, place.layer.scope, first)
        chosen = self._chosen(ops, place, keep)
        short = self._short(ops, stream, chosen)
        renumber = self.options.positions == "renumber"
        following = Following(self.graph, place.layer.stack, place.tokens, chosen.index, renumber)
        following.run(stream, short, first)
        if self.sizes is not None and self.options.proportional:
            self.sized |= dict.fromkeys(following.attentions, self.sizes)
        for value in following.exits():
            self._restore(stream, value, chosen, place)

    def skip(self, place: Place, keep: Dim) -> None:
        """Let ``keep`` tokens alone have an MLP. Raises PassError where there is none of its own behind attention."""
        behind = place.mlp()
        if behind is None or place.stream.node is None or place.stream.node.following is None:
            raise _no_mlp(place)
        first, whole = place.stream.node.following, place.stream.shape
        ops = Ops(self.graph, place.layer.scope, first)
        numbers, chosen = self.numbers, self._chosen(ops, place, keep)
        short, self.sizes, self.numbers = self._short(ops, place.stream, chosen), None, numbers
        following = Following(self.graph, place.layer.stack, place.tokens, chosen.index, False, behind.node)
        following.run(place.stream, short, first)
        if following.exits() != [behind.made]:
            raise _no_mlp(place)
        ops = Ops(self.graph, place.layer.scope, behind.node)
        nothing = ops("full", shape=whole, value=0.0)
        made = ops("token_restore", nothing, behind.made, chosen.index, *self._gone(chosen))
        self.graph.set_input(behind.node, 1 - behind.place, made)

    def _chosen(self, ops: Ops, place: Place, keep: Dim) -> Chosen:
        merge, own = self.options.merge, {"keep": keep, "prefix": self.prefix, "suffix": self.suffix}
        if self.options.alike:
            index, rest, into = ops.all("token_match", metric(ops, place, self.options), **own)
            return Chosen(index, rest, into) if merge == "bipartite" else Chosen(index)
        if merge == "words":
            return Chosen(*self._words(ops, place, int(keep)).chosen(ops, int(keep), self.prefix, self.suffix))
        if merge == "average":
            fixed = self.prefix + self.suffix
            first, slots = neighbours(ops, place, self.prefix, int(place.tokens) - fixed, int(keep) - fixed)
            index, rest = ops.all("token_select", first, **own)
            return Chosen(index, rest, ops("token_take", slots, rest))
        if self.numbers is None:
            self.numbers = self._from_the_first(self._outside(ops, place), place)
        weight = scores(ops, place, self.options, self.numbers)
        if self.options.score == "learned":
            weight = add_gate(self.graph, self.ctx.spill, place, self.options.seed).scores(ops, place.stream, weight)
        if self.options.block > 1:
            weight = ops("token_blocks", weight, size=self.options.block)
        if self.pictures is not None:
            weight = self.pictures.protect(ops, weight)
        index, rest = ops.all("token_select", weight, **own)
        if self.pictures is not None and self.options.skip == "layers":
            flags = self._outside(ops, place)("token_take", self.pictures.flags, index)
            self.pictures = replace(self.pictures, flags=flags)
        self.numbers = self.numbers and self._outside(ops, place)("token_take", self.numbers, index)
        return Chosen(index, rest, None, weight) if merge == "extra" else Chosen(index)

    def _words(self, ops: Ops, place: Place, keep: int) -> Words:
        options, count = self.options, keep - self.prefix - self.suffix
        inner = slice(self.prefix, int(place.tokens) - self.suffix)
        return words(ops, self.ctx, place, metric(ops, place, options), inner, count, options.learn, options.seed)

    def _from_the_first(self, ops: Ops, place: Place) -> Value | None:
        if self.pictures is not None and self.options.shown:
            return self.pictures.class_scores(ops, self.options.crops)
        return by_place(ops, place) if self.options.by_place else None

    def _outside(self, ops: Ops, place: Place) -> Ops:
        """For what layers share."""
        return Ops(self.graph, place.layer.stack.rpartition(".")[0], ops.anchor)

    def _short(self, ops: Ops, stream: Value, chosen: Chosen) -> Value:
        if chosen.rest is None:
            return ops("token_take", stream, chosen.index)
        weight = chosen.weight or self.sizes or ops("full", shape=stream.shape[:2], value=1.0)
        short, sizes = ops.all("token_merge", stream, weight, chosen.index, chosen.rest, chosen.into)
        self.sizes = sizes if chosen.into is not None else None
        return short

    def _restore(self, stream: Value, value: Value, chosen: Chosen, place: Place) -> None:
        """Give what reads ``value`` behind the layers all tokens."""
        assert value.node is not None and value.node.following is not None  # it was computed from fewer
        if value.shape[2:] != stream.shape[2:] or value.type.rank != stream.type.rank:
            raise PassError(
                f"what leaves `{value.node.scope}` is not the stream of the layers",
                remedy=LATER,
            )
        readers = Readers.of(self.graph, place.layer.stack, value)
        ops = Ops(self.graph, place.layer.stack.rpartition(".")[0], value.node.following)
        readers.read(self.graph, ops("token_restore", stream, value, chosen.index, *self._gone(chosen)))

    def _gone(self, chosen: Chosen) -> tuple[Value | None, Value | None]:
        return (chosen.rest, chosen.into) if chosen.into is not None else (None, None)

    def weigh(self) -> None:
        """Let a mean of n tokens be attended to as n are: log n is added to its scores."""
        logs: dict[Value, Value] = {}
        for node, sizes in self.sized.items():
            ops = Ops(self.graph, node.scope, node)
            if sizes not in logs:
                batch, count = sizes.shape
                logs[sizes] = ops("reshape", ops("log", sizes), shape=(batch, 1, 1, count))
            attend(ops, node, logs[sizes])


def _no_mlp(place: Place) -> PassError:
    cause = f"{place.layer.scope} has no MLP of its own behind its attention"
    return PassError(cause, option="skip", remedy="write `skip: layers`, or leave this layer out of `layers`")


def reduce(graph: Graph, ctx: Context, options: DropTokens) -> None:
    """Raises PassError when the model has no such places, or cannot lose so many tokens there."""
    if graph.nodes_named("token_restore"):
        raise PassError("tokens are dropped already", remedy="write one `drop-tokens` with a list for `keep`")
    found = places(graph, options.layers, options.site, options.stack)
    first, last = ends(graph, found[0])
    prefix = first if options.prefix is None else options.prefix
    suffix = last if options.suffix is None else options.suffix
    if options.merge == "words" and len(found) > 1:
        raise PassError("words are found behind one layer", option="layers", remedy="name one, such as `0`")
    if options.merge in ("extra", "average", "words") and isinstance(found[0].tokens, str):
        raise PassError(
            "tokens are merged where every sample has as many, and these may be padded",
            option="merge",
            remedy="leave out `merge`",
        )
    reduction = Reduction(graph, options, prefix, suffix, ctx)
    if options.tokens == "pictures":
        reduction.pictures = pictures(graph, found[0].stream)
    remain = _wanted(found[0].tokens, len(found), reduction)
    windows = ctx.calibration() if options.score == "learned" else []
    trains = options.score == "learned" and not ctx.planned
    learner = learning(graph, ctx, options, remain, (prefix, suffix)) if trains else None
    for place, wanted in zip(found, remain, strict=True):
        before = place.tokens
        keep = _least(before, wanted, options, prefix, suffix)
        reason = _unneeded(before, keep, options)
        if reason:
            ctx.skipped(place.layer.scope, reason)
            continue
        (reduction.drop if options.skip == "layers" else reduction.skip)(place, keep)
        numbers = {"before": before, "after": keep} if isinstance(before, int) and isinstance(keep, int) else {}
        if isinstance(keep, int) and isinstance(wanted, int) and keep > wanted:
            ctx.warn(
                f"{keep} tokens remain behind {place.layer.scope} and not {wanted}: of each two neighbours one can go"
            )
        go_on = "remain" if options.skip == "layers" else "go through its MLP"
        what = f"{keep} of {before} tokens {go_on}, others are {FATES[options.merge]}"
        ctx.rewrote(place.layer.scope, what, **numbers)
    reduction.weigh()
    graph.prune()
    if learner is not None:
        learner.train(graph, ctx, options, windows)


def _wanted(tokens: Dim, steps: int, reduction: Reduction) -> list[Dim]:
    """How many tokens are to remain behind each of ``steps`` layers."""
    options, shown = reduction.options, reduction.pictures
    if shown is None:
        return _counts(tokens, options, steps, reduction.prefix, reduction.suffix)
    return [shown.left(tokens, int(keep)) for keep in _counts(shown.count, options, steps, 0, 0)]


def _counts(tokens: Dim, options: DropTokens, steps: int, prefix: int, suffix: int) -> list[Dim]:
    if options.skip == "mlp":
        parts = options.keep if isinstance(options.keep, tuple) else (options.keep,) * steps
        whole = replace(options, skip="layers")
        return [_counts(tokens, replace(whole, keep=(part,)), 1, prefix, suffix)[0] for part in parts]
    if options.alike and isinstance(tokens, str):
        return paired(tokens, options.keep, steps, prefix, suffix)
    return counts(tokens, options.keep, steps, prefix + suffix + (options.merge in ("average", "words")))


def _least(before: Dim, keep: Dim, options: DropTokens, prefix: int, suffix: int) -> Dim:
    """``keep``, or what there is without one of each two neighbours: where tokens go by pairs, no more can."""
    most = mergeable(before, prefix, suffix)
    known = options.alike and isinstance(before, int) and isinstance(keep, int) and isinstance(most, int)
    return max(int(keep), int(before) - int(most)) if known else keep


def _unneeded(before: Dim, keep: Dim, options: DropTokens) -> str:
    """Why no token is dropped."""
    extra = 1 if options.merge == "extra" else 0
    known = isinstance(before, int) and isinstance(keep, int)
    if before == keep or (known and int(before) <= int(keep) + extra):
        return f"all of its {before} tokens remain"
    return ""
