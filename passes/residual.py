"""Small products beside quantised weights: what rounding lost, as far as it matters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compiler.allocate import Option, allocate
from compiler.calibration.fidelity import Fidelity, spread
from compiler.calibration.moments import Statistics, measure
from compiler.errors import PassError
from compiler.factor import Factors, Kind, Metric, best, left_of, right_of, spectrum
from compiler.ir.graph import Graph, Param
from compiler.ir.layers import copy_of
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass
from compiler.weights.expr import Expr
from compiler.weights.ops.codec import is_quantised, rounded_from

STEPS = 24  # ranks that a weight may get
LARGEST = 0.5  # of a weight's numbers: what its factors hold at most
MOMENT_TOKENS, GRADIENT_TOKENS, CHOICE_TOKENS = 16384, 8192, 2048

Ranks = dict[Param, int]
Made = dict[Param, tuple[Expr, Expr]]
"""Of each weight V [r, n] and U [m, r]."""

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
    metric: Kind = "loss"
    ranks: Literal["measured", "uniform"] = "measured"

    exact_when: ClassVar = None
    edits_weights: ClassVar[bool] = False
    compares: ClassVar[bool] = True

    @property
    def calibrated(self) -> bool:
        return self.metric != "plain" or self.ranks == "measured"

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when no selected weight is quantised, or ``add`` is less than what rank 1 holds."""
        params = _quantised(ctx, ctx.select(self.where, skip=self.skip))
        even = {param: int(self.add * param.type.numel / _sides(param)) for param in params}
        even = {param: rank for param, rank in even.items() if rank}
        if not even:
            raise PassError("`add` is less than what products of rank 1 hold", option="add", remedy="add more")
        made = _planned(ctx, even) if ctx.planned else self._nearest(graph, ctx, params, even)
        for param, factors in made.items():
            rank, columns = factors[0].shape
            shown = f"[{param.expr.shape[0]}, {columns}] with a product of rank {rank} beside it"
            ctx.rewrote(param.name, shown, rank=rank, parameters_added=sum(part.type.numel for part in factors))
        for param in params:
            if param not in made:
                ctx.skipped(param.name, "what rounding lost here matters less than elsewhere")
        _write(graph, made)

    def _nearest(self, graph: Graph, ctx: Context, params: Sequence[Param], even: Ranks) -> Made:
        """The factors that bring the whole model nearest to the original."""
        batches = ctx.calibration() if self.calibrated else []
        gradients = spread(batches, GRADIENT_TOKENS) if self.metric == "loss" else ()
        given = spread(batches, MOMENT_TOKENS) if batches else ()
        losses = _Losses(ctx, measure(graph, params, given, ctx.progress, gradients=gradients), self.metric)
        if self.ranks == "uniform":
            return losses.factorised(even)
        shared = losses.shared(params, self.add * sum(param.type.numel for param in params))
        choices: dict[str, Ranks] = {"no products": {}, "the same part for each": even, "shared out by cost": shared}
        fidelity = Fidelity(ctx.original, spread(batches, CHOICE_TOKENS, 1))
        found: dict[str, tuple[float, Made]] = {}
        for what, ranks in choices.items():
            made, trial = losses.factorised(ranks), copy_of(graph)
            _write(trial, made)
            found[what] = fidelity.distance(trial), made
        nearest = min(found, key=lambda what: found[what][0])
        for what, (distance, _) in found.items():
            ctx.tried(what, distance, what == nearest)
        return found[nearest][1]


@dataclass(frozen=True)
class _Losses:
    """What rounding lost in each weight, and what that costs."""

    ctx: Context
    statistics: Statistics
    kind: Kind

    def factorised(self, ranks: Ranks) -> Made:
        return {param: self._factors(param, rank) for param, rank in ranks.items()}

    def _factors(self, param: Param, rank: int) -> tuple[Expr, Expr]:
        return _kept(self.ctx, param, best(self._lost(param), self._metric(param), rank, False, param.storage))

    def shared(self, params: Sequence[Param], budget: float) -> Ranks:
        """The ranks of least predicted cost whose factors hold at most ``budget`` numbers."""
        ranks = {param: _ranks(param) for param in params}
        options = [self._options(param, ranks[param]) for param in params]
        chosen = zip(params, allocate(options, budget), strict=True)
        return {param: ranks[param][index] for param, index in chosen if ranks[param][index]}

    def _options(self, param: Param, ranks: Sequence[int]) -> list[Option]:
        found = spectrum(self._lost(param), self._metric(param))
        return [Option(rank * _sides(param), found.lost(rank)) for rank in ranks]

    def _lost(self, param: Param) -> Tensor:
        """What was rounded less what it was rounded to, float64 [m, n]."""
        exact = rounded_from(param.expr)
        assert exact is not None  # others are obstacles
        return self.ctx.value(exact).double() - self.ctx.read(param).double()

    def _metric(self, param: Param) -> Metric:
        found = self.statistics.of(param)
        return Metric((left_of(self.kind, found.gradient, param.expr.shape[0]),), right_of(self.kind, found))


def _quantised(ctx: Context, params: Sequence[Param]) -> list[Param]:
    """The quantised weights of linear maps among ``params``; others are reported as skipped."""
    reasons = {param: _obstacle(param) for param in params}
    for param, reason in reasons.items():
        if reason:
            ctx.skipped(param.name, reason)
    found = [param for param, reason in reasons.items() if not reason]
    if not found:
        raise PassError(
            "none of the selected weights is quantised to the nearest codes",
            option="where",
            remedy="put `quantize` with `method: nearest` before it",
        )
    return found


def _obstacle(param: Param) -> str:
    if not is_quantised(param.expr):
        return "it is not quantised"
    if rounded_from(param.expr) is None:
        return "its codes were chosen on calibration data, and what they were chosen for is not kept"
    node = param.single_user()
    single = node is not None and node.op.name == "linear"
    return "" if single else "it is not the weight of one linear map"


def _sides(param: Param) -> int:
    """m + n: the numbers that a rank of factors holds."""
    return sum(param.type.static_shape)


def _ranks(param: Param) -> list[int]:
    """None and some more, small ones closer together."""
    largest = LARGEST * param.type.numel / _sides(param)
    return sorted({round(largest * (step / STEPS) ** 2) for step in range(STEPS + 1)})


def _planned(ctx: Context, ranks: Ranks) -> Made:
    """Factors of the right shapes, without values; what is read has none."""
    made: Made = {}
    for param, rank in ranks.items():
        rows, columns = ctx.read(param).shape
        first, second = (
            torch.empty(size, dtype=param.storage, device="meta") for size in ((rank, columns), (rows, rank))
        )
        made[param] = _kept(ctx, param, Factors(first, second))
    return made


def _kept(ctx: Context, param: Param, factors: Factors) -> tuple[Expr, Expr]:
    return ctx.spill(f"{param.name}.first", factors.first), ctx.spill(f"{param.name}.second", factors.second)


def _write(graph: Graph, made: Made) -> None:
    """Add the products to what the weights make in ``graph``, which may be a copy of the weights' own graph."""
    for param, factors in made.items():
        (node,) = graph.params[param.name].users
        value, module = node.input(0), param.name.removesuffix(".weight").replace(".weight.", "_")
        for word, factor in zip(("down", "up"), factors, strict=True):
            weight = graph.add_param(f"{module}_{word}.weight", factor)
            value = graph.op("linear", [value, weight], scope=f"{module}_{word}", before=node)
        rounded = graph.op("linear", node.inputs, scope=node.scope, before=node)
        graph.replace(node.output, graph.op("add", [rounded, value], scope=module.rpartition(".")[0], before=node))
        graph.erase(node)
