"""The pass: measure, rank, choose how much of what remains, cut, refit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.allocate import numbers_left
from compiler.calibration.fidelity import Fidelity, spread
from compiler.calibration.moments import measure
from compiler.calibration.slopes import slopes
from compiler.errors import PassError
from compiler.ir.facts import parameter_count
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import copy_of
from compiler.pipeline import Context
from passes.prune.choose import Budget, Choice, Counts, Numbers, Rankings, by_layer, choose, options, uniform
from passes.prune.cut import View, cut
from passes.prune.depth import Block, blocks_of, influences, losses, take_out
from passes.prune.perturbation import perturbed
from passes.prune.places import Place, matching, measurable, places_of
from passes.prune.ranking import Ranking
from passes.prune.refit import refit, writers
from passes.prune.scores import Scores, check_slopes
from passes.prune.speed import Seconds, budget_of, report_speed
from passes.prune.turned import turned

if TYPE_CHECKING:
    from passes.prune import Prune

GRADIENT_TOKENS = 12288
PROBE_TOKENS = 1024
REFIT_TOKENS = 24576
CURVE = 24
"""Steps of the curves in the report."""
HELD_EVERY = 16
"""Of the samples one in so many is for choices; nothing else sees it."""

Batches = Sequence[Mapping[str, Tensor]]


def reduce(graph: Graph, ctx: Context, wanted: Prune, params: Sequence[Param]) -> None:
    """Prune ``graph`` as ``wanted`` says, counting the numbers of ``params``."""
    ctx.read_weights = True  # also where a plan does without: what goes depends on them
    batches = ctx.calibration() if wanted.calibrated else []
    train, held = _divided(batches)
    numbers = parameter_count(graph)
    if wanted.rotate:
        turned(graph, ctx, train)
    places = places_of(graph, ctx, wanted.kinds, params)
    blocks = blocks_of(graph, ctx, wanted.kinds)
    if not places and not blocks:
        raise PassError("the model has nothing of the kinds in `what`", option="what")
    check_slopes(wanted.score, places)
    scores = _scores(graph, ctx, wanted, places, train)
    rankings = _rankings(graph, ctx, wanted, places, scores, held)
    alone = _alone(graph, wanted, blocks, held)
    budget = _budget(graph, ctx, wanted, params, places, numbers)
    choice = _choose(graph, ctx, wanted, budget, rankings, alone, scores, held)
    if isinstance(budget, Seconds):
        report_speed(ctx, budget, choice)
    original = copy_of(graph)
    same = dict(zip(graph.nodes, original.nodes, strict=True))
    views = _apply(graph, ctx, choice, rankings, None if ctx.planned or not train else scores)
    if wanted.rotate:
        _check_smaller(graph, numbers)
    _report(ctx, places, rankings, choice, alone, "influence" if wanted.score == "influence" else "predicted_loss")
    if wanted.refit and train and not ctx.planned:
        _refit(graph, original, same, views, ctx, params, train, held)


def _alone(graph: Graph, wanted: Prune, blocks: Sequence[Block], held: Batches) -> dict[Block, float]:
    """What the model loses without each block, or how much each turns the stream; zeros where nothing was measured."""
    if not held or not blocks:
        return dict.fromkeys(blocks, 0.0)
    measured = influences if wanted.score == "influence" else losses
    return measured(graph, blocks, spread(held, PROBE_TOKENS))


def _check_smaller(graph: Graph, before: int) -> None:
    """Raises PassError when what a head of its own takes is more than what was pruned."""
    after = parameter_count(graph)
    if after >= before:
        raise PassError(
            f"{after} parameters remain of {before}: turned, the head cannot share the embedding's table any more",
            option="rotate",
            remedy="leave `rotate` out, or keep less",
        )


def _divided(batches: Batches) -> tuple[Batches, Batches]:
    """Samples to measure on, and those to choose by. Raises PassError when there are too few."""
    if batches and len(batches) < 2:
        raise PassError("pruning needs two samples of calibration data", remedy="raise `samples` of `calibration`")
    step = min(HELD_EVERY, len(batches)) or 1
    held = [batch for index, batch in enumerate(batches) if index % step == step - 1]
    return [batch for index, batch in enumerate(batches) if index % step != step - 1], held


def _scores(graph: Graph, ctx: Context, wanted: Prune, places: Sequence[Place], train: Batches) -> Scores:
    readers = measurable(graph, places)
    if not train or not readers:
        return Scores(ctx, "magnitude", None)
    gradients = spread(train, GRADIENT_TOKENS) if wanted.score == "loss" else ()
    measured = measure(graph, readers, train, ctx.progress, gradients=gradients)
    by_slope = wanted.score == "taylor"
    first = slopes(graph, readers, spread(train, GRADIENT_TOKENS), ctx.progress) if by_slope else None
    return Scores(ctx, wanted.score, measured, first)


def _rankings(
    graph: Graph, ctx: Context, wanted: Prune, places: Sequence[Place], scores: Scores, held: Batches
) -> dict[Place, Ranking]:
    if ctx.planned:
        return {place: _unmeasured(place) for place in places}
    if wanted.score == "output":
        return perturbed(graph, places, spread(held, PROBE_TOKENS))
    return {place: scores.rank(place) for place in places}


def _unmeasured(place: Place) -> Ranking:
    return Ranking(tuple(range(place.size)), torch.zeros(place.size + 1))


def _budget(
    graph: Graph, ctx: Context, wanted: Prune, params: Sequence[Param], places: Sequence[Place], whole: int
) -> Numbers | Seconds:
    """``whole`` is how many parameters the model had."""
    if wanted.faster > 1:
        return budget_of(graph, ctx, wanted, places)
    counted = params if wanted.of == "selected" else [p for p in graph.params.values() if p.persistent]
    numbers = sum(param.type.numel for param in params) if wanted.of == "selected" else whole
    return Numbers(counted, numbers_left(wanted.keep, numbers, whole, wanted.of))


def _choose(
    graph: Graph,
    ctx: Context,
    wanted: Prune,
    budget: Budget,
    rankings: Rankings,
    alone: Mapping[Block, float],
    scores: Scores,
    held: Batches,
) -> Choice:
    if wanted.keep > 1:
        return Choice(_counted(rankings, int(wanted.keep), wanted.align), _surplus(alone, int(wanted.keep)))
    found = _choices(ctx, wanted, budget, rankings, alone)
    if ctx.planned or not held or len(found) == 1:
        return list(found.values())[-1]
    fidelity = Fidelity(graph, held)
    distances = {
        name: fidelity.distance(_trial(graph, ctx, choice, rankings, scores)) for name, choice in found.items()
    }
    best = min(found, key=lambda name: distances[name])
    for name, distance in distances.items():
        ctx.tried(f"sizes {name}", distance, name == best)
    return found[best]


def _choices(
    ctx: Context, wanted: Prune, budget: Budget, rankings: Rankings, alone: Mapping[Block, float]
) -> dict[str, Choice]:
    """By every way to share. Where only seconds can tell what is within the budget, a plan leaves all as it is."""
    shares = {"uniform": uniform} | ({"by layer": by_layer} if wanted.sizes == "by-layer" else {})
    try:
        return {name: choose(rankings, alone, wanted.align, budget, share) for name, share in shares.items()}
    except PassError:
        if not isinstance(budget, Seconds) or not budget.guessed:
            raise
        ctx.skipped("", "multiplications do not tell what reaches this speed: this plan shows all as it is")
        return {"uniform": Choice({place: place.size for place in rankings})}


def _counted(rankings: Rankings, count: int, align: int) -> Counts:
    """``count`` everywhere. Raises PassError where that is more than there is, or not to be had."""
    for place in rankings:
        if count not in options(place, align):
            raise PassError(
                f"{place.name} cannot keep {count} of its {place.size} {place.kind}",
                option="keep",
                remedy=f"choose from {', '.join(map(str, options(place, align)[:6]))} ...",
            )
    return dict.fromkeys(rankings, count)


def _surplus(alone: Mapping[Block, float], count: int) -> tuple[Block, ...]:
    """The blocks that go where ``count`` remain. Raises PassError when there are not so many."""
    if alone and count > len(alone):
        raise PassError(f"there are {len(alone)} to keep, not {count}", option="keep", remedy="keep fewer")
    return tuple(sorted(alone, key=lambda block: alone[block])[: len(alone) - count]) if alone else ()


def _trial(graph: Graph, ctx: Context, choice: Choice, rankings: Rankings, scores: Scores) -> Graph:
    """A pruned copy of ``graph``, not refitted."""
    trial = copy_of(graph)
    there = matching(trial, rankings)
    counts = {there[place]: count for place, count in choice.counts.items()}
    cut(trial, ctx, counts, {there[place]: ranking for place, ranking in rankings.items()}, scores)
    values = dict(zip(_values(graph), _values(trial), strict=True))
    take_out(trial, [replace(block, enters=values[block.enters], leaves=values[block.leaves]) for block in choice.gone])
    return trial


def _values(graph: Graph) -> list[Value]:
    return [*graph.inputs.values(), *(value for node in graph.nodes for value in node.outputs)]


def _apply(graph: Graph, ctx: Context, choice: Choice, rankings: Rankings, scores: Scores | None) -> dict[Value, View]:
    views = cut(graph, ctx, choice.counts, rankings, scores)
    take_out(graph, choice.gone)
    return views


def _refit(
    graph: Graph,
    original: Graph,
    same: Mapping[Node, Node],
    views: Mapping[Value, View],
    ctx: Context,
    params: Sequence[Param],
    train: Batches,
    held: Batches,
) -> None:
    """Refit what writes to the residual stream, and keep that if the model is nearer to the original by it."""
    chosen = {param for param in writers(graph.nodes) if param in set(params)}
    if not chosen:
        ctx.skipped("", "nothing is refitted: no linear map writes straight to the residual stream")
        return
    before = {param: param.expr for param in chosen}
    fidelity = Fidelity(original, held)
    was = fidelity.distance(graph)
    refit(graph, original, same, views, ctx, chosen, spread(train, REFIT_TOKENS))
    now = fidelity.distance(graph)
    ctx.tried("as it is cut", was, was <= now)
    ctx.tried("refitted", now, now < was)
    if was <= now:
        for param, expr in before.items():
            param.expr = expr
        ctx.skipped("", f"refitting is undone: {was:.4g} from the original without it, {now:.4g} with it")


def _report(
    ctx: Context,
    places: Sequence[Place],
    rankings: Rankings,
    choice: Choice,
    alone: Mapping[Block, float],
    measure: str,
) -> None:
    """``measure`` is what ``alone`` says of blocks."""
    for block in choice.gone:
        ctx.rewrote(block.scope, "taken out", **{measure: alone[block]})
    lost = {param for block in choice.gone for param in block.params}
    for place in places:
        if lost & place.params.keys():
            continue
        kept = choice.counts[place]
        _weighed(ctx, place, rankings[place], kept)
        if kept == place.size:
            ctx.skipped(place.name, f"keeps all {kept} {place.kind}")
            continue
        ctx.rewrote(
            place.name,
            f"{kept} of {place.size} {place.kind}",
            kept=kept,
            parameters_before=place.cost * place.size,
            parameters_after=place.cost * kept,
            predicted_loss=float(rankings[place].losses[kept]),
        )


def _weighed(ctx: Context, place: Place, ranking: Ranking, kept: int) -> None:
    """Report what ``place`` would lose with a few numbers of its indices, where that is predicted."""
    if not ranking.losses.any():
        return
    counts = sorted({round(place.size * step / CURVE) for step in range(CURVE + 1)})
    losses = [float(ranking.losses[count]) for count in counts]
    ctx.weighed(place.name, [count / place.size for count in counts], losses, kept / place.size)
