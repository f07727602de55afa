"""The weights of a place and what an error in them costs, by the metric that was asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibration.fidelity import spread
from compiler.calibration.moments import Moments, Statistics, measure
from compiler.factor import Kind, Metric, left_of, right_of
from compiler.ir.graph import Graph
from compiler.pipeline import Context
from passes.low_rank.places import Place, bias_of

if TYPE_CHECKING:
    from passes.low_rank import LowRank

MOMENT_TOKENS = 16384
GRADIENT_TOKENS = 8192

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Metrics:
    """``kind`` is the option ``metric``; ``centred``: the mean of inputs costs nothing, as a bias makes up for it."""

    ctx: Context
    statistics: Statistics
    kind: Kind
    centred: bool

    def weight(self, place: Place) -> Tensor:
        """The weights of ``place``, stacked: float64 [rows, columns]."""
        matrices = [self.ctx.read(param).double() for param in place.params]
        return torch.cat([matrix.reshape(len(matrix), -1) for matrix in matrices])

    def expected(self, place: Place, matrix: Tensor) -> Tensor:
        """What ``matrix`` [rows, columns] makes of mean inputs, each weight's rows of its own: float64 [rows]."""
        parts = zip(place.params, matrix.split(place.rows), strict=True)
        return torch.cat([part @ self.statistics.of(param).mean for param, part in parts])

    def of(self, place: Place) -> Metric:
        return self.given(place, self.statistics.of(place.params[0]))

    def given(self, place: Place, inputs: Moments) -> Metric:
        """The metric with the second moment of ``inputs`` instead of what was measured."""
        found = zip(place.params, place.rows, strict=True)
        left = [self.left(self.statistics.of(param).gradient, rows) for param, rows in found]
        return Metric(tuple(left), self.right(inputs, self.centred))

    def left(self, gradient: Tensor | None, rows: int) -> Tensor:
        """L of M, where the kind has one, of ``rows`` outputs."""
        return left_of(self.kind, gradient, rows)

    def right(self, inputs: Moments, centred: bool = False) -> Tensor:
        """R of C, as the kind has it."""
        return right_of(self.kind, inputs, centred)

    def mended(self, place: Place, matrix: Tensor) -> Tensor | None:
        """The bias beside factors of ``matrix``: what is there, and if ``centred`` what keeps the mean of outputs."""
        bias = self.bias(place)
        if not self.centred:
            return bias
        return self.expected(place, self.weight(place) - matrix) + (0 if bias is None else bias)

    def bias(self, place: Place) -> Tensor | None:
        """The biases that are there, zeros where there is none: float64 [rows]; None when there are none at all."""
        found = [bias_of(param) for param in place.params]
        if not any(found):
            return None
        values = [
            torch.zeros(rows, dtype=torch.float64) if bias is None else self.ctx.read(bias).double()
            for bias, rows in zip(found, place.rows, strict=True)
        ]
        return torch.cat(values)


def measured(graph: Graph, ctx: Context, places: Sequence[Place], options: LowRank, batches: Batches) -> Metrics:
    """The metrics of ``places``, for which the model runs over a part of ``batches`` where the options need it."""
    params = [param for place in places for param in place.params]
    gradients = spread(batches, GRADIENT_TOKENS) if options.metric == "loss" else ()
    given = spread(batches, MOMENT_TOKENS) if batches else ()
    statistics = measure(graph, params, given, ctx.progress, gradients=gradients)
    return Metrics(ctx, statistics, options.metric, options.bias)
