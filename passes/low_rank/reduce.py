"""The pass: measure, choose ranks, factorise, and keep what is nearest to the original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from compiler.allocate import numbers_left
from compiler.calibration.fidelity import Fidelity, spread
from compiler.factor import spectrum
from compiler.ir.facts import parameter_count
from compiler.ir.graph import Graph, Param
from compiler.ir.layers import copy_of
from compiler.pipeline import Context
from passes.low_rank.choose import STEPS, Choice, Costs, Ranked, allocated, by_threshold, losses, uniform
from passes.low_rank.forms import Structured, approximated, planned
from passes.low_rank.groups import sharing, together
from passes.low_rank.metrics import Batches, Metrics, measured
from passes.low_rank.places import Form, Place
from passes.low_rank.rewrite import Stored
from passes.low_rank.select import places_of
from passes.low_rank.shared import Shared
from passes.low_rank.tables import Table, hidden
from passes.low_rank.update import factorised_in_order

if TYPE_CHECKING:
    from passes.low_rank import LowRank

CHOICE_TOKENS = 2048

Made = dict[Ranked, Stored]


def reduce(graph: Graph, ctx: Context, options: LowRank, params: Sequence[Param]) -> None:
    """Factorise ``params`` of ``graph`` as ``options`` say."""
    whole = parameter_count(graph)
    places = places_of(graph, ctx, params, options.form)
    form = Form(options.form, options.bias)
    groups = sharing(places, options.share)
    options = replace(options, keep=_part(whole, places, options))
    joint = [together(group, options.share) for group in groups]
    even = uniform(places if options.ranks == "measured" else joint, form, options.keep)
    costs: Costs = {}
    if ctx.planned:
        made = {ranked: _planned(ctx, form, ranked) for ranked in even}
    else:
        batches = ctx.calibration() if options.calibrated else []
        metrics = measured(graph, ctx, places, options, batches)
        costs = _costs(metrics, {*places, *joint})
        made = _nearest(_Search(graph, ctx, options, metrics, form, batches), even, joint, groups, costs)
    _report(ctx, form, places, tuple(made), costs)
    for ranked, factors in made.items():
        factors.write(graph, ranked.place)
    for place in {*places} - {ranked.place for ranked in made}:
        if isinstance(place, Table):
            hidden(graph, place)


def _part(whole: int, places: Sequence[Place], options: LowRank) -> float:
    """The part of what can be factorised that remains."""
    full = sum(place.full for place in places)
    return numbers_left(options.keep, full, whole, options.of) / full


def _costs(metrics: Metrics, places: Iterable[Place]) -> Costs:
    """What every place loses with its ranks."""
    return {place: _saved(metrics, place) for place in places}


def _saved(metrics: Metrics, place: Place) -> Tensor:
    if isinstance(place, Shared):
        return place.saved(metrics)
    if isinstance(place, Structured):
        return place.costs(metrics.weight(place), metrics.of(place))
    return spectrum(metrics.weight(place), metrics.of(place)).costs


@dataclass(frozen=True)
class _Search:
    """What it takes to try factors on a copy of the graph."""

    graph: Graph
    ctx: Context
    options: LowRank
    metrics: Metrics
    form: Form
    batches: Batches

    def factorised(self, choice: Choice) -> Made:
        return {ranked: _factorised(self.metrics, self.form, ranked) for ranked in choice}

    def updated(self, made: Made) -> Made:
        """The same ranks, factorised in order; weights with several uses or inputs keep the factors they have."""
        return factorised_in_order(self.graph, self.metrics, self.form, made, self.batches)


def _nearest(
    search: _Search, even: Choice, joint: Sequence[Place], groups: Sequence[Sequence[Place]], costs: Costs
) -> Made:
    """The factors, of those that the options allow, that bring the whole model nearest to the original.

    ``joint`` are the ``groups`` as one place each.
    """
    options = search.options
    tries: dict[str, Callable[[Made], Made]] = {"the same part of each": lambda _: search.factorised(even)}
    if options.ranks == "measured":
        shared_out = allocated([*zip(groups, joint, strict=True)], costs, search.form, options.keep)
        tries["shared out by cost"] = lambda _: search.factorised(shared_out)
    elif options.ranks == "spectra":
        cut = by_threshold(joint, costs, search.form, options.keep)
        tries["one threshold for all spectra"] = lambda _: search.factorised(cut)
    if options.update:
        tries["factorised in order"] = search.updated
    if len(tries) == 1:
        return search.factorised(even)
    fidelity = Fidelity(search.graph, spread(search.batches, CHOICE_TOKENS, 1))
    found: dict[str, tuple[float, Made]] = {}
    nearest: Made = {}
    for what, attempt in tries.items():
        made = attempt(nearest)
        found[what] = _distance(search.graph, made, fidelity), made
        nearest = min(found.values(), key=lambda one: one[0])[1]
    for what, (distance, made) in found.items():
        search.ctx.tried(what, distance, made is nearest)
    return nearest


def _distance(graph: Graph, made: Made, fidelity: Fidelity) -> float:
    trial = copy_of(graph)
    for ranked, factors in made.items():
        factors.write(trial, ranked.place)
    return fidelity.distance(trial)


def _factorised(metrics: Metrics, form: Form, ranked: Ranked) -> Stored:
    """The best factors of the rank, and a bias that keeps the mean of outputs where the form has one."""
    place, rank = ranked.place, ranked.rank
    if isinstance(place, Shared):
        return place.factorised(metrics, rank)
    found = approximated(form, place, rank, metrics.weight(place), metrics.of(place))
    return found.stored(metrics.ctx.spill, place, metrics.mended(place, found.matrix()))


def _planned(ctx: Context, form: Form, ranked: Ranked) -> Stored:
    place, rank = ranked.place, ranked.rank
    return place.planned(ctx, form, rank) if isinstance(place, Shared) else planned(ctx, form, place, rank)


def _report(ctx: Context, form: Form, places: Sequence[Place], choice: Choice, costs: Costs) -> None:
    chosen = {param for ranked in choice for param in ranked.place.params}
    for ranked in choice:
        place, rank = ranked.place, ranked.rank
        rows, columns = place.shape
        kind = place.words or ("pivoted" if form.pivoted(place, rank) else "a pair")
        predicted = {"predicted_loss": float(costs[place][rank:].sum())} if costs else {}
        ctx.rewrote(
            place.name,
            f"[{rows}, {columns}] by rank {rank}, {kind}",
            rank=rank,
            parameters_before=place.full,
            parameters_after=form.size(place, rank),
            **predicted,
        )
    for place in places:
        if place.params[0] not in chosen:
            ctx.skipped(place.name, "stays as it is: factors of it save less than they cost")
    if costs:
        got = {ranked.place: ranked.rank for ranked in choice}
        for place in [*got, *(place for place in places if place.params[0] not in chosen)]:
            _weighed(ctx, place, got.get(place), losses(costs[place]).tolist())


def _weighed(ctx: Context, place: Place, rank: int | None, lost: Sequence[float]) -> None:
    """Report the spectrum of ``place`` as what it would lose with a few ranks, and the rank it got (None: all)."""
    most = len(lost) - 1
    ranks = sorted({round(most * step / STEPS) for step in range(STEPS + 1)})
    got = 1.0 if rank is None else rank / most
    ctx.weighed(place.name, [rank / most for rank in ranks], [lost[rank] for rank in ranks], got)
