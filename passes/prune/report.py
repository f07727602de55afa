"""What the report says of every place: what is gone, what is predicted to be lost by it, and the curve of that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compiler.pipeline import Context
from passes.prune.choose import Choice, Rankings
from passes.prune.depth import Block
from passes.prune.places import Place
from passes.prune.ranking import Ranking

CURVE = 24
"""Steps of a curve."""


def report(
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
