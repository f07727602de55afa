"""Cut what was chosen out of a graph, the columns that stay making up for those that go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.ir.graph import Graph, Param, Value
from compiler.pipeline import Context
from compiler.rewrite.removal import remove, reorder
from compiler.rewrite.stream import narrow
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import reshape
from passes.prune.choose import Counts
from passes.prune.places import Place
from passes.prune.ranking import Ranking, restored
from passes.prune.scores import Scores, bias_of


@dataclass(frozen=True)
class View:
    """What a value holds of what it held: ``kept`` of its last axis, times ``factor``."""

    kept: list[int]
    factor: float

    def __call__(self, before: Tensor) -> Tensor:
        return before[..., self.kept] * self.factor


def cut(
    graph: Graph, ctx: Context, counts: Counts, rankings: Mapping[Place, Ranking], scores: Scores | None
) -> dict[Value, View]:
    """Leave of every place ``counts``. ``scores`` say how readers make up for what goes; without, nothing does.

    Returns what is left of values in a residual stream that got narrower.
    """
    views: dict[Value, View] = {}
    for place, count in counts.items():
        if count == place.size:
            continue
        kept = rankings[place].kept(count)
        made = _restored(ctx, place, kept, scores) if scores is not None else {}
        if place.outer is not None:
            reorder(place.outer, place.group, rankings[place].rows or _as_they_are(place))
        if place.kind == "hidden":
            views |= {value: View(kept, factor) for value, factor in narrow(graph, place.group, kept).items()}
        else:
            remove(graph, dict.fromkeys(place.groups, kept), numbered=place.kind == "experts")
        for param, expr in made.items():
            param.expr = reshape(expr, param.type.static_shape)
    return views


def _as_they_are(place: Place) -> list[list[int]]:
    assert place.outer is not None  # the caller has looked
    return [list(range(place.size)) for _ in range(place.outer.size)]


def _restored(ctx: Context, place: Place, kept: list[int], scores: Scores) -> dict[Param, Expr]:
    """New values of the readers of ``place`` and, where they have one, of their bias, which keeps the mean."""
    if place.kind == "experts":
        return {}
    made: dict[Param, Expr] = {}

    def keep(param: Param, tensor: Tensor) -> None:
        made[param] = ctx.spill(param.name, tensor.to(param.storage))

    for member in place.readers:
        readers = scores.split(place, member)
        if any(reader.moments is None for reader in readers) or _is_table(member.param):
            continue
        tensors = [restored(reader, kept) for reader in readers]
        keep(member.param, tensors[0] if len(tensors) == 1 else torch.stack(tensors))
        bias, moments = bias_of(member.param), readers[0].moments
        if bias is not None and moments is not None:
            left = moments.mean[readers[0].remaining(kept)]
            gone = readers[0].weight.double() @ moments.mean - tensors[0] @ left
            keep(bias, ctx.read(bias).double() + gone)
    return made


def _is_table(param: Param) -> bool:
    """Whether ``param`` is also looked up, as what is fitted for a product must not be."""
    return any(node.op.name not in ("linear", "conv", "experts") for node in param.users)
