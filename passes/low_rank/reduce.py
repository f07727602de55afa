"""The pass: measure, choose ranks, factorise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.fidelity import Fidelity, spread
from compiler.ir.graph import Graph, Param
from compiler.ir.layers import copy_of
from compiler.pipeline import Context
from passes.low_rank.choose import Choice, Costs, Ranked, allocated, together, uniform
from passes.low_rank.factor import Factors, best, spectrum
from passes.low_rank.metrics import Batches, Metrics, measured
from passes.low_rank.places import Form, Place, bias_of, places_of, sharing
from passes.low_rank.rewrite import Writer
from passes.low_rank.update import factorise_in_order

if TYPE_CHECKING:
    from passes.low_rank import LowRank

CHOICE_TOKENS = 2048


def reduce(graph: Graph, ctx: Context, options: LowRank, params: Sequence[Param]) -> None:
    """Factorise ``params`` of ``graph`` as ``options`` say."""
    places = places_of(graph, ctx, params)
    form = Form(options.form, options.bias)
    batches = ctx.calibration() if options.calibrated else []
    if ctx.planned:
        choice = uniform(places, form, options.keep)
        _report(ctx, form, places, choice, {})
        for ranked in choice:
            Writer(graph, ctx.spill).write(ranked.place, *_planned(ranked, form))
        return
    metrics = measured(graph, ctx, places, options, batches)
    groups = sharing(places) if options.share else [[place] for place in places]
    costs = _costs(metrics, groups)
    choice = _choose(graph, ctx, options, metrics, groups, costs, batches)
    _report(ctx, form, places, choice, costs)
    if options.update:
        choice = factorise_in_order(graph, ctx, metrics, form, choice, batches)
    factorise(Writer(graph, ctx.spill), metrics, form, choice)


def _costs(metrics: Metrics, groups: Sequence[Sequence[Place]]) -> Costs:
    """What every place, and every group of several as one, loses with its ranks."""
    places = [place for group in groups for place in group]
    places += [together(group) for group in groups if len(group) > 1]
    return {place: spectrum(metrics.weight(place), metrics.of(place)).costs for place in places}


def _choose(
    graph: Graph,
    ctx: Context,
    options: LowRank,
    metrics: Metrics,
    groups: Sequence[Sequence[Place]],
    costs: Costs,
    batches: Batches,
) -> Choice:
    form = Form(options.form, options.bias)
    even = uniform([place for group in groups for place in group], form, options.keep)
    if options.ranks == "uniform":
        return even
    fidelity = Fidelity(graph, spread(batches, CHOICE_TOKENS, 1))
    found: dict[str, tuple[float, Choice]] = {}
    for what, choice in (("the same part of each", even), ("shared out", allocated(groups, costs, form, options.keep))):
        trial = copy_of(graph)
        factorise(Writer(trial, ctx.spill), metrics, form, choice)
        found[what] = fidelity.distance(trial), choice
    best = min(found, key=lambda what: found[what][0])
    for what, (distance, _) in found.items():
        ctx.tried(what, distance, what == best)
    return found[best][1]


def factorise(writer: Writer, metrics: Metrics, form: Form, choice: Sequence[Ranked]) -> None:
    """Put the best factors of the chosen ranks in the place of every chosen weight."""
    for ranked in choice:
        place, rank = ranked.place, ranked.rank
        weight, bias = metrics.weight(place), metrics.bias(place)
        factors = best(weight, metrics.of(place), rank, form.pivoted(place, rank), place.params[0].storage)
        if form.bias:
            bias = (weight - factors.matrix()) @ metrics.mean(place) + (0 if bias is None else bias)
        writer.write(place, factors, bias)


def _planned(ranked: Ranked, form: Form) -> tuple[Factors, Tensor | None]:
    """Factors of the right shapes, and a bias where there will be one, without values."""
    place, rank = ranked.place, ranked.rank

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    biased = form.bias or any(bias_of(param) for param in place.params)
    bias = empty(place.height) if biased else None
    if form.pivoted(place, rank):
        order = empty(place.height, dtype=torch.int64)
        return Factors(empty(rank, place.columns), empty(place.height - rank, rank), order), bias
    return Factors(empty(rank, place.columns), empty(place.height, rank)), bias


def _report(ctx: Context, form: Form, places: Sequence[Place], choice: Choice, costs: Costs) -> None:
    chosen = {param: ranked for ranked in choice for param in ranked.place.params}
    for ranked in choice:
        place, rank = ranked.place, ranked.rank
        kind = "pivoted" if form.pivoted(place, rank) else "a pair"
        numbers = {"predicted_loss": float(costs[place][rank:].sum())} if costs else {}
        ctx.rewrote(
            place.name,
            f"[{place.height}, {place.columns}] by rank {rank}, {kind}",
            rank=rank,
            parameters_before=place.full,
            parameters_after=form.size(place, rank),
            **numbers,
        )
    for place in places:
        if place.params[0] not in chosen:
            ctx.skipped(place.name, "stays as it is: factors of it save less than they cost")
