"""The pass: say what remains of every weight, make them sparse in the order of computation, and report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibration.fidelity import Fidelity, spread
from compiler.calibration.moments import Moments, Statistics, at_stage, measure
from compiler.calibration.sweep import sweep
from compiler.ir.graph import Graph, Node, Param
from compiler.ir.layers import copy_of
from compiler.pipeline import Context
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import reshape
from compiler.weights.ops.sparse import mask_width, packed, scatter
from passes.sparsify.places import Parts, Pattern, Place, by_layer, options, places_of, uniform
from passes.sparsify.solve import DAMPING, Problem, damped, solve

if TYPE_CHECKING:
    from passes.sparsify import Sparsify

MOMENT_TOKENS = 16384
GRADIENT_TOKENS = 8192
CHOICE_TOKENS = 2048

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Made:
    """A sparse weight, and its error over the weight's own size, both as outputs show them."""

    expr: Expr
    error: float


def reduce(graph: Graph, ctx: Context, wanted: Sparsify, params: Sequence[Param]) -> None:
    """Make ``params`` of ``graph`` sparse as ``wanted`` says."""
    places = places_of(graph, ctx, params, wanted.parsed)
    pattern = wanted.parsed
    even: Parts = dict.fromkeys(places, pattern) if pattern else uniform(places, wanted.keep)
    batches = ctx.calibration() if wanted.calibrated else []
    if ctx.planned:
        parts, made = even, {place: Made(_planned(ctx, place, even), 0.0) for place in places}
    else:
        parts, made = _nearest(_Job(graph, ctx, wanted, places, batches), even)
    for place in places:
        place.param.expr = made[place].expr
        _report(ctx, place, parts, made[place])


def _nearest(job: _Job, even: Parts) -> tuple[Parts, dict[Place, Made]]:
    """What the options allow that brings the model nearest to the original."""
    if job.wanted.sizes == "uniform":
        return even, job.made(even)
    shared = by_layer(job.places, job.losses(), job.wanted.keep)
    fidelity = Fidelity(job.graph, spread(job.batches, CHOICE_TOKENS, 1))
    found = [(parts, job.made(parts)) for parts in (even, shared)]
    distances = [fidelity.distance(job.sparse(made)) for _, made in found]
    best = distances.index(min(distances))
    for index, what in enumerate(("the same part of each", "shared out by cost")):
        job.ctx.tried(what, distances[index], index == best)
    return found[best]


class _Job:
    """What it takes to make weights sparse on a copy of the graph."""

    def __init__(self, graph: Graph, ctx: Context, wanted: Sparsify, places: Sequence[Place], batches: Batches) -> None:
        self.graph = graph
        self.ctx = ctx
        self.wanted = wanted
        self.places = places
        self.batches = batches
        self._given = spread(batches, MOMENT_TOKENS) if batches else []
        self._known = self._measured()

    def made(self, parts: Parts) -> dict[Place, Made]:
        """Every place made sparse: those with several products first, the others on what has passed those before."""
        if not self.wanted.calibrated:
            return {place: self._one(place, parts, None) for place in self.places}
        trial = copy_of(self.graph)
        made: dict[Place, Made] = {}
        for place, moments in self._in_order(trial):
            made[place] = self._one(place, parts, moments)
            trial.params[place.param.name].expr = made[place].expr
        return made

    def sparse(self, made: Mapping[Place, Made]) -> Graph:
        """A copy of the graph with what was made."""
        trial = copy_of(self.graph)
        for place, one in made.items():
            trial.params[place.param.name].expr = one.expr
        return trial

    def losses(self) -> dict[Place, list[float]]:
        """What the options of every place are predicted to lose, in the units of ``compiler.calibration.moments``."""
        return {place: self._losses(place) for place in self.places}

    def _measured(self) -> Statistics | None:
        """What is measured on the model as it is: M, and the moments of weights that several products read."""
        if not self.wanted.calibrated:
            return None
        several = [place for place in self.places if len(place.nodes) > 1]
        whole = self.wanted.weighs or self.wanted.sizes == "by-layer"
        params = [place.param for place in (self.places if whole else several)]
        gradients = spread(self.batches, GRADIENT_TOKENS) if whole else ()
        return measure(self.graph, params, self._given, self.ctx.progress, gradients=gradients)

    def _in_order(self, trial: Graph) -> Iterator[tuple[Place, Moments]]:
        """Every place with the moments of what enters it in ``trial``, which is made sparse between yields."""
        assert self._known is not None
        twin = dict(zip(self.graph.nodes, trial.nodes, strict=True))
        single: dict[Node, list[Place]] = {}
        for place in self.places:
            if len(place.nodes) == 1:
                single.setdefault(twin[place.nodes[0]], []).append(place)
            else:
                yield place, self._known.of(place.param)
        for stage in sweep(trial, self._given) if single else ():
            own = {node: single.pop(node) for node in stage.nodes if node in single}
            for group in _by_input(own):
                params = [trial.params[place.param.name] for place in group]
                moments = at_stage(trial, stage, params)
                for place, param in zip(group, params, strict=True):
                    yield place, moments[param]
            if not single:
                return

    def _one(self, place: Place, parts: Parts, moments: Moments | None) -> Made:
        """``place`` made sparse, given the moments of what enters it."""
        kept: list[Tensor] = []
        values: list[Tensor] = []
        lost = whole = 0.0
        for problem in self._problems(place, moments, self.wanted.weighs):
            mask, sparse = solve(problem, self.wanted.method, parts[place])
            kept.append(mask)
            values.append(sparse.to(place.param.storage))
            lost += problem.cost(values[-1].double())
            whole += problem.cost(torch.zeros_like(sparse))
        expr = _stored(self.ctx, place, parts, torch.stack(kept), torch.stack(values))
        return Made(expr, lost / whole if whole else 0.0)

    def _losses(self, place: Place) -> list[float]:
        assert self._known is not None
        lost = torch.zeros(place.size + 1, dtype=torch.float64)
        for problem in self._problems(place, self._known.of(place.param), True):
            lost[1:] += problem.saliency().flatten().sort()[0].cumsum(0) / 2
        return [float(lost[place.size - count]) for count in options(place, self.wanted.keep)]

    def _problems(self, place: Place, moments: Moments | None, weighs: bool) -> Iterator[Problem]:
        """The matrices of ``place``; without ``moments`` an error is what it is, whatever enters."""
        columns = place.shape[2]
        costs = self._costs(place) if weighs else torch.ones(place.shape[:2], dtype=torch.float64)
        for expert, weight in enumerate(self.ctx.read(place.param).double().reshape(place.shape)):
            if moments is None:
                second = torch.eye(columns, dtype=torch.float64)
            else:
                second = damped(moments.second.reshape(-1, columns, columns)[expert])
            yield Problem(weight, second, costs[expert])

    def _costs(self, place: Place) -> Tensor:
        """What an error of each output costs [experts, rows]: the diagonal of M, damped; 1 where nothing was seen."""
        assert self._known is not None
        experts, rows, _ = place.shape
        gradient = self._known.of(place.param).gradient
        assert gradient is not None
        whole = gradient.ndim == 2 + place.stacked
        energy = (gradient.diagonal(dim1=-2, dim2=-1) if whole else gradient).reshape(experts, rows)
        mean = energy.mean(-1, keepdim=True)
        return torch.where(mean > 0, energy + DAMPING * mean, 1.0)


def _by_input(places: Mapping[Node, Sequence[Place]]) -> list[list[Place]]:
    """The places of nodes in order, those together that one measurement can serve."""
    found: dict[object, list[Place]] = {}
    for node, own in places.items():
        for place in own:
            found.setdefault(node.input(0) if node.op.name == "linear" else place, []).append(place)
    return list(found.values())


def _stored(ctx: Context, place: Place, parts: Parts, kept: Tensor, values: Tensor) -> Expr:
    """The expression of what remains, of [experts, rows, columns] in the weight's own dtype."""
    experts, rows, _ = place.shape
    lead = ([experts] if place.stacked else []) + ([rows] if isinstance(parts[place], Pattern) else [])
    mask = packed(kept) if place.stacked else packed(kept)[0]
    return _expr(ctx, place, mask, values[kept].reshape(*lead, -1))


def _planned(ctx: Context, place: Place, parts: Parts) -> Expr:
    """An expression of the right type, without values."""
    experts, rows, columns = place.shape
    kept, like = place.kept(parts[place]), ctx.read(place.param)
    lead = [experts] if place.stacked else []
    each = [rows, kept // rows] if isinstance(parts[place], Pattern) else [kept]
    mask = like.new_empty((*lead, rows, mask_width(columns)), dtype=torch.uint8)
    return _expr(ctx, place, mask, like.new_empty((*lead, *each), dtype=place.param.storage))


def _expr(ctx: Context, place: Place, mask: Tensor, values: Tensor) -> Expr:
    name, columns = place.param.name, place.shape[2]
    made = scatter(ctx.spill(f"{name}.mask", mask), ctx.spill(f"{name}.values", values), columns)
    return reshape(made, place.param.expr.shape)


def _report(ctx: Context, place: Place, parts: Parts, made: Made) -> None:
    experts, rows, columns = place.shape
    part, kept = parts[place], experts * place.kept(parts[place])
    how = f"{part.kept} of each {part.of}" if isinstance(part, Pattern) else f"{kept / (experts * place.size):.1%}"
    shown = f"{experts} x [{rows}, {columns}]" if place.stacked else f"[{rows}, {columns}]"
    measured = {} if ctx.planned else {"relative_error": made.error}
    ctx.rewrote(place.param.name, f"{how} of {shown} remain", kept=kept, elements=experts * place.size, **measured)
