"""The pass: measure what enters, choose the numbers, and fold them into weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibration.fidelity import Fidelity, spread
from compiler.calibration.moments import Moments, Statistics, measure
from compiler.calibration.products import matrix_shape
from compiler.errors import PassError
from compiler.ir.graph import Graph, Param
from compiler.ir.layers import copy_of
from compiler.pipeline import Context
from compiler.rewrite.scaling import divide
from compiler.weights.expr import Expr, load
from compiler.weights.source import MemorySource
from passes.smooth.search import ROWS, Choice, Matrix, choices, quantised
from passes.smooth.sites import Reader, Site, sites_of

if TYPE_CHECKING:
    from passes.smooth import Smooth

MOMENT_TOKENS = 16384
GRADIENT_TOKENS = 8192
CHOICE_TOKENS = 2048
DAMPING = 0.01  # of the mean cost of a row's errors, added to each


def smooth(graph: Graph, ctx: Context, wanted: Smooth, params: Sequence[Param]) -> None:
    """Scale the channels that ``params`` read as ``wanted`` says."""
    sites = sites_of(graph, ctx, params, insert=wanted.insert)
    readers = [reader.param for site in sites for reader in site.readers]
    _check_groups(readers, wanted.group)
    batches = ctx.calibration()
    if ctx.planned:
        for site in sites:
            _apply(ctx, site, torch.empty(site.region.size, dtype=torch.float64, device="meta"))
            ctx.rewrote(site.name, _what(site))
        return
    gradients = spread(batches, GRADIENT_TOKENS) if wanted.weighs else ()
    known = measure(graph, readers, spread(batches, MOMENT_TOKENS), ctx.progress, gradients=gradients)
    found = [_choices(ctx, site, known, wanted) for site in sites]
    best = _nearest(graph, ctx, wanted, sites, found, batches)
    for site, own in zip(sites, found, strict=True):
        _apply(ctx, site, own[best].s)
        before = own["none"].cost
        ctx.rewrote(site.name, _what(site), relative_cost=own[best].cost / before if before else 1.0)


def _choices(ctx: Context, site: Site, known: Statistics, wanted: Smooth) -> dict[str, Choice]:
    matrices = [matrix for reader in site.readers for matrix in _matrices(ctx, reader, known)]
    return choices(matrices, site.region.size, wanted)


def _nearest(
    graph: Graph,
    ctx: Context,
    wanted: Smooth,
    sites: Sequence[Site],
    found: Sequence[Mapping[str, Choice]],
    batches: Sequence[Mapping[str, Tensor]],
) -> str:
    """The method that is taken: with `fit` the one whose rounded model is measured to be nearest to the original."""
    if wanted.method != "fit":
        return wanted.method
    fidelity = Fidelity(graph, spread(batches, CHOICE_TOKENS, 1))
    distances: dict[str, float] = {}
    for method in found[0]:
        trial = copy_of(graph)
        for site, own in zip(sites, found, strict=True):
            _try(trial, site, own[method].s, wanted)
        distances[method] = fidelity.distance(trial)
    best = min(distances, key=distances.__getitem__)
    for method, distance in distances.items():
        ctx.tried(f"scales of {method}, rounded", distance, method == best)
    return best


def _try(trial: Graph, site: Site, s: Tensor, wanted: Smooth) -> None:
    """Scale a site of a copy of the graph, and round what reads it."""
    factors = {trial.params[param.name]: own for param, own in site.region.factors.items()}
    divide(replace(site.region, factors=factors), _held(trial, site.name, s))
    for reader in site.readers:
        param = trial.params[reader.param.name]
        param.expr = quantised(param.expr, wanted, param.storage)


def _held(trial: Graph, name: str, s: Tensor) -> Expr:
    """s as an expression of the copy's own."""
    source = MemorySource({name: s})
    trial.sources = {**trial.sources, f"trial of {name}": source}
    return load(f"trial of {name}", name, source.types[name])


def _check_groups(params: Sequence[Param], group: int) -> None:
    wrong = [param for param in params if group and matrix_shape(param)[2] % group]
    if group < 0 or wrong:
        what = f"{matrix_shape(wrong[0])[2]}, the input width of {wrong[0].name}" if wrong else "any width"
        raise PassError(f"groups of {group} do not divide {what}", option="group", remedy="0 is one scale a row")


def _apply(ctx: Context, site: Site, s: Tensor) -> None:
    divide(site.region, ctx.spill(f"{site.name}.smooth", s))


def _what(site: Site) -> str:
    others = f" and {len(site.readers) - 1} more that read the same" if len(site.readers) > 1 else ""
    return f"{site.region.size} channels{others}, absorbed by {', '.join(site.absorbed_by)}"


def _matrices(ctx: Context, reader: Reader, known: Statistics) -> Iterator[Matrix]:
    """What a weight reads by, one for each expert of a stack."""
    moments, weight = known.of(reader.param), ctx.read(reader.param).float()
    labels = reader.columns.labels
    if weight.ndim != 3:
        yield _matrix(reader, weight.flatten(1), moments, labels.expand(1, *weight.shape[1:]).flatten())
        return
    for expert, own in enumerate(weight):
        yield _matrix(reader, own, moments.of_expert(expert), labels.expand(len(weight), -1, -1)[expert, 0])


def _matrix(reader: Reader, weight: Tensor, moments: Moments, labels: Tensor) -> Matrix:
    """A matrix with statistics of its inputs, on evenly spaced rows."""
    assert moments.magnitude is not None and moments.largest is not None
    step = -(-len(weight) // ROWS)
    costs = _costs(moments.gradient, len(weight))
    rows, seen = weight[::step], (moments.second.float(), moments.magnitude.float(), moments.largest.float())
    costs = costs[::step] * moments.count
    return Matrix(rows, costs, *seen, labels, reader.columns.exponent, reader.param.storage)


def _costs(gradient: Tensor | None, rows: int) -> Tensor:
    """What an error of each output costs: the diagonal of M, damped; 1 where nothing was seen."""
    if gradient is None:
        return torch.ones(rows, dtype=torch.float64)
    energy = gradient.diagonal() if gradient.ndim == 2 else gradient
    mean = energy.mean()
    return energy + DAMPING * mean if mean > 0 else torch.ones_like(energy)
