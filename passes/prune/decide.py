"""How much of what remains: a number that was given, or the better of ways to share that are measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from compiler.calibration.fidelity import Fidelity
from compiler.errors import PassError
from compiler.ir.graph import Graph, Value
from compiler.ir.layers import copy_of
from compiler.pipeline import Context
from passes.prune.choose import Budget, Choice, Counts, Rankings, by_layer, choose, options, uniform
from passes.prune.cut import cut
from passes.prune.depth import Block, take_out
from passes.prune.places import matching
from passes.prune.scores import Scores
from passes.prune.speed import Seconds

if TYPE_CHECKING:
    from passes.prune import Prune

Batches = Sequence[Mapping[str, Tensor]]


def decide(
    graph: Graph,
    ctx: Context,
    wanted: Prune,
    budget: Budget,
    rankings: Rankings,
    alone: Mapping[Block, float],
    scores: Scores,
    held: Batches,
) -> Choice:
    """What remains: of ``rankings`` and of the layers that ``alone`` names, with what the model loses without each.

    Ways to share a budget are compared on ``held``. Raises PassError when nothing is within it.
    """
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
