"""The pass: measure, rank, decide how much of what remains, cut, refit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from passes.prune.choose import Choice, Numbers, Rankings
from passes.prune.cut import View, cut
from passes.prune.decide import decide
from passes.prune.depth import Block, blocks_of, influences, losses, take_out
from passes.prune.perturbation import perturbed
from passes.prune.places import Place, measurable, places_of
from passes.prune.ranking import Ranking
from passes.prune.refit import refit, writers
from passes.prune.report import report
from passes.prune.scores import Scores, check_slopes
from passes.prune.speed import Seconds, budget_of, report_speed
from passes.prune.turned import turned

if TYPE_CHECKING:
    from passes.prune import Prune

GRADIENT_TOKENS = 12288
PROBE_TOKENS = 1024
REFIT_TOKENS = 24576
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
        raise PassError(
            f"nothing to prune of {', '.join(wanted.kinds)}: {ctx.first_skipped or 'the model has none'}",
            option="what",
            remedy="name other kinds in `what`",
        )
    check_slopes(wanted.score, places)
    scores = _scores(graph, ctx, wanted, places, train)
    rankings = _rankings(graph, ctx, wanted, places, scores, held)
    alone = _alone(graph, wanted, blocks, held)
    budget = _budget(graph, ctx, wanted, params, places, numbers)
    choice = decide(graph, ctx, wanted, budget, rankings, alone, scores, held)
    if isinstance(budget, Seconds):
        report_speed(ctx, budget, choice)
    if ctx.planned and choice.gone:
        ctx.warn("which layers go is measured when the recipe runs: this plan shows the first ones in their place")
    original = copy_of(graph)
    same = dict(zip(graph.nodes, original.nodes, strict=True))
    views = _apply(graph, ctx, choice, rankings, None if ctx.planned or not train else scores)
    if wanted.rotate:
        _check_smaller(graph, numbers)
    report(ctx, places, rankings, choice, alone, "influence" if wanted.score == "influence" else "predicted_loss")
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
