"""Small products beside quantised weights: what rounding lost, as far as it matters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compiler.allocate import Option, allocate
from compiler.errors import PassError
from compiler.fidelity import Fidelity, spread
from compiler.ir.graph import Graph, Param
from compiler.ir.layers import copy_of
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass
from compiler.weights.expr import Expr
from passes.low_rank import LowRank
from passes.low_rank.factor import Factors, best, spectrum
from passes.low_rank.metrics import Metrics, measured
from passes.low_rank.places import Place, module_of

STEPS = 24  # ranks that a weight may get
LARGEST = 0.5  # of a weight's numbers: what its factors hold at most
CHOICE_TOKENS = 2048

Ranks = dict[Place, int]
Part = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Residual(Pass):
    """Add to quantised weights Q products U V of two small matrices, so that Q + U V is nearer to what was rounded.

    The factors hold ``add`` of the numbers of the selected weights. U V is the matrix of its rank nearest to W - Q by
    ``metric``, which is that of `low-rank`: `loss` and `input` count an error by what it changes on calibration data
    (LQER, arXiv 2402.02446; EoRA, arXiv 2410.21271, is `input`), `plain` counts all numbers alike and needs none.
    ``ranks``: `measured` shares the numbers out by predicted cost and keeps the result only if the model is nearer
    to the original than with the same part for each weight (`uniform`), or than without any.

    Never exact. It follows `quantize`.
    """

    where: Selector = "linear"
    skip: tuple[str, ...] = ()
    add: Part = 0.05
    metric: Literal["loss", "input", "scaled", "plain"] = "loss"
    ranks: Literal["measured", "uniform"] = "measured"

    exact_when: ClassVar = None
    edits_weights: ClassVar[bool] = False
    compares: ClassVar[bool] = True

    @property
    def calibrated(self) -> bool:
        return self.metric != "plain" or self.ranks == "measured"

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when no selected weight is quantised, or ``add`` is less than what rank 1 holds."""
        places = _places(ctx, ctx.select(self.where, skip=self.skip))
        even = {place: int(self.add * place.full / (place.height + place.columns)) for place in places}
        even = {place: rank for place, rank in even.items() if rank}
        if not even:
            raise PassError("`add` is less than what products of rank 1 hold", option="add", remedy="add more")
        if ctx.planned:
            made = {place: _planned(ctx, place, rank) for place, rank in even.items()}
        else:
            made = self._nearest(graph, ctx, places, even)
        for place, factors in made.items():
            ctx.rewrote(
                place.name,
                f"[{place.height}, {place.columns}] with a product of rank {factors[0].shape[0]} beside it",
                rank=factors[0].shape[0],
                parameters_added=sum(part.type.numel for part in factors),
            )
            _write(graph, place, factors)
        for place in places:
            if place not in made:
                ctx.skipped(place.name, "what rounding lost here matters less than elsewhere")

    def _nearest(self, graph: Graph, ctx: Context, places: Sequence[Place], even: Ranks) -> dict[Place, _Kept]:
        """The factors that bring the whole model nearest to the original."""
        batches = ctx.calibration() if self.calibrated else []
        metrics = measured(graph, ctx, places, LowRank(metric=self.metric, bias=False), batches)
        if self.ranks == "uniform":
            return {place: _factorised(metrics, place, rank) for place, rank in even.items()}
        budget = self.add * sum(place.full for place in places)
        choices = {
            "no products": {},
            "the same part for each": even,
            "shared out by cost": _shared(metrics, places, budget),
        }
        fidelity = Fidelity(ctx.original, spread(batches, CHOICE_TOKENS, 1))
        found: dict[str, tuple[float, dict[Place, _Kept]]] = {}
        for what, ranks in choices.items():
            made = {place: _factorised(metrics, place, rank) for place, rank in ranks.items()}
            trial = copy_of(graph)
            for place, factors in made.items():
                _write(trial, place, factors)
            found[what] = fidelity.distance(trial), made
        nearest = min(found, key=lambda what: found[what][0])
        for what, (distance, _) in found.items():
            ctx.tried(what, distance, what == nearest)
        return found[nearest][1]


_Kept = tuple[Expr, Expr]
"""V [r, n] and U [m, r]."""


def _places(ctx: Context, params: Sequence[Param]) -> list[Place]:
    """The quantised weights of linear maps among ``params``; others are reported as skipped."""
    found: list[Place] = []
    for param in params:
        reason = _obstacle(param)
        if reason:
            ctx.skipped(param.name, reason)
        else:
            found.append(Place((param,)))
    if not found:
        raise PassError("none of the selected weights is quantised", option="where", remedy="put `quantize` before it")
    return found


def _obstacle(param: Param) -> str:
    if param.expr.op != "dequantize" or param.expr.args[0].op != "quantize":
        return "it is not quantised"
    node = param.single_user()
    single = node is not None and node.op.name == "linear"
    return "" if single else "it is not the weight of one linear map"


def _lost(metrics: Metrics, place: Place) -> Tensor:
    """What was rounded less what it was rounded to, float64 [m, n]."""
    (param,) = place.params
    return metrics.ctx.value(param.expr.args[0].args[0]).double() - metrics.ctx.read(param).double()


def _factorised(metrics: Metrics, place: Place, rank: int) -> _Kept:
    storage = place.params[0].storage
    return _kept(metrics.ctx, place, best(_lost(metrics, place), metrics.of(place), rank, False, storage))


def _planned(ctx: Context, place: Place, rank: int) -> _Kept:
    ctx.read(place.params[0])
    sizes = (rank, place.columns), (place.height, rank)
    first, second = (torch.empty(size, dtype=place.params[0].storage, device="meta") for size in sizes)
    return _kept(ctx, place, Factors(first, second))


def _kept(ctx: Context, place: Place, factors: Factors) -> _Kept:
    return ctx.spill(f"{place.name}.first", factors.first), ctx.spill(f"{place.name}.second", factors.second)


def _shared(metrics: Metrics, places: Sequence[Place], budget: float) -> Ranks:
    """The ranks of least predicted cost whose factors hold at most ``budget`` numbers."""
    costs = {place: spectrum(_lost(metrics, place), metrics.of(place)).costs for place in places}
    ranks = {place: _ranks(place) for place in places}
    options = [[_option(place, rank, costs) for rank in ranks[place]] for place in places]
    chosen = zip(places, allocate(options, budget), strict=True)
    return {place: ranks[place][index] for place, index in chosen if ranks[place][index]}


def _ranks(place: Place) -> list[int]:
    """None and some more, small ones closer together."""
    largest = LARGEST * place.full / (place.height + place.columns)
    return sorted({round(largest * (step / STEPS) ** 2) for step in range(STEPS + 1)})


def _option(place: Place, rank: int, costs: Mapping[Place, Tensor]) -> Option:
    return Option(rank * (place.height + place.columns), float(costs[place][rank:].sum()))


def _write(graph: Graph, place: Place, factors: _Kept) -> None:
    """Add the product to what the weight of ``place`` makes in ``graph``, which may be a copy of its own graph."""
    param = graph.params[place.params[0].name]
    (node,) = param.users
    value, module = node.input(0), module_of(param.name)
    for word, factor in zip(("down", "up"), factors, strict=True):
        weight = graph.add_param(f"{module}_{word}.weight", factor)
        value = graph.op("linear", [value, weight], scope=f"{module}_{word}", before=node)
    rounded = graph.op("linear", node.inputs, scope=node.scope, before=node)
    graph.replace(node.output, graph.op("add", [rounded, value], scope=module.rpartition(".")[0], before=node))
    graph.erase(node)
