"""Cut what was chosen out of a graph, the columns that stay making up for those that go."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compiler.ir.graph import Graph, Param
from compiler.pipeline import Context
from compiler.removal import remove, reorder
from passes.prune.choose import Counts
from passes.prune.places import Place
from passes.prune.ranking import Ranking, restored
from passes.prune.scores import Scores, bias_of


def cut(graph: Graph, ctx: Context, counts: Counts, rankings: Mapping[Place, Ranking], scores: Scores | None) -> None:
    """Leave of every place ``counts``. ``scores`` say how readers make up for what goes; without, nothing does."""
    for place, count in counts.items():
        if count == place.size:
            continue
        kept = rankings[place].kept(count)
        made = _restored(ctx, place, kept, scores) if scores is not None else {}
        if place.outer is not None:
            reorder(place.outer, place.group, rankings[place].rows or _as_they_are(place))
        remove(graph, dict.fromkeys(place.groups, kept), numbered=place.kind == "experts")
        for param, tensor in made.items():
            param.expr = ctx.spill(param.name, tensor.reshape(param.type.static_shape).to(param.storage))


def _as_they_are(place: Place) -> list[list[int]]:
    assert place.outer is not None  # the caller has looked
    return [list(range(place.size)) for _ in range(place.outer.size)]


def _restored(ctx: Context, place: Place, kept: list[int], scores: Scores) -> dict[Param, Tensor]:
    """New values of the readers of ``place`` and, where they have one, of their bias, which keeps the mean."""
    if place.kind == "experts":
        return {}
    made: dict[Param, Tensor] = {}
    for member in place.readers:
        readers = scores.split(place, member)
        if any(reader.moments is None for reader in readers):
            continue
        tensors = [restored(reader, kept) for reader in readers]
        made[member.param] = tensors[0] if len(tensors) == 1 else torch.stack(tensors)
        bias, moments = bias_of(member.param), readers[0].moments
        if bias is not None and moments is not None:
            left = moments.mean[readers[0].remaining(kept)]
            gone = readers[0].weight.double() @ moments.mean - tensors[0] @ left
            made[bias] = ctx.read(bias).double() + gone
    return made
