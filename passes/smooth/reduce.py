"""The pass: measure what enters, choose the numbers, and fold them into weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibration.fidelity import spread
from compiler.calibration.moments import Moments, Statistics, measure
from compiler.calibration.products import matrix_shape
from compiler.errors import PassError
from compiler.ir.graph import Graph, Param
from compiler.pipeline import Context
from compiler.rewrite.scaling import divide
from passes.smooth.search import ROWS, Matrix, chosen
from passes.smooth.sites import Reader, Site, sites_of

if TYPE_CHECKING:
    from passes.smooth import Smooth

MOMENT_TOKENS = 16384
GRADIENT_TOKENS = 8192
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
    for site in sites:
        matrices = [matrix for reader in site.readers for matrix in _matrices(ctx, reader, known)]
        s, after, before = chosen(matrices, site.region.size, wanted)
        _apply(ctx, site, s)
        ctx.rewrote(site.name, _what(site), relative_cost=after / before if before else 1.0)


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
