"""Tensor trains of two cores: a matrix as a sum of Kronecker products (CompactifAI, arXiv 2401.14109).

W [m, n] with m = a c and n = b d becomes the sum of r products A_k x B_k, A_k [a, b] and B_k [c, d]: r (a b + c d)
numbers. With W's elements in the order (row in A, column in A), (row in B, column in B) it is a matrix [a b, c d] of
rank r, so singular values give the best. For what weighs errors to be such products as well, C and M are taken as the
products of their partial traces: C = C_b x C_d, which is exact where the two parts of an index are independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.factor import ROUNDING, Metric, Spectrum, root, spectrum, truncated
from compiler.ir.graph import Graph
from passes.low_rank.forms import Approximation, Line, Structured, meta, shift
from passes.low_rank.places import Place
from passes.low_rank.rewrite import Keep, Stored


class Train(Structured):
    """A linear map whose outputs and inputs are each cut into two parts, as near to squares as they divide."""

    @property
    def cut(self) -> tuple[int, int, int, int]:
        """a, b, c, d."""
        rows, columns = _divisor(self.height), _divisor(self.columns)
        return rows, columns, self.height // rows, self.columns // columns

    @property
    def most(self) -> int:
        a, b, c, d = self.cut
        return min(a * b, c * d)

    @property
    def words(self) -> str:
        return "a tensor train of cores [{}, {}] and [{}, {}]".format(*self.cut)

    def numbers(self, rank: int) -> int:
        a, b, c, d = self.cut
        return rank * (a * b + c * d)

    def costs(self, weight: Tensor, metric: Metric) -> Tensor:
        return self._found(weight, _Parts.of(metric, self.cut))[1].costs

    def approximated(self, weight: Tensor, metric: Metric, rank: int) -> Approximation:
        (a, b, c, d), parts = self.cut, _Parts.of(metric, self.cut)
        matrix, found = self._found(weight, parts)
        left, right = truncated(matrix, _plain(matrix), found, rank)
        first = _unweighted(parts.outer, left.view(a, b, rank))
        second = _unweighted(parts.inner, right.T.reshape(c, d, rank))
        return TwoCores(*(core.to(self.params[0].storage) for core in (first, second.mT)))

    def empty(self, rank: int) -> Approximation:
        a, b, c, d = self.cut
        return TwoCores(meta(a, b, rank), meta(c, rank, d))

    def _found(self, weight: Tensor, parts: _Parts) -> tuple[Tensor, Spectrum]:
        """W as it is felt and seen, its elements in the order of the two cores [a b, c d], and its singular values."""
        a, b, c, d = self.cut
        outer, inner = parts.outer, parts.inner
        rows = outer.felt(weight.reshape(a, -1)).view(a, c, b, d)
        ordered = inner.felt(rows.movedim(1, 0).flatten(1)).view(c, a, b, d)
        seen = inner.seen(outer.seen(ordered.mT).mT)
        matrix = seen.permute(1, 2, 0, 3).reshape(a * b, c * d)
        return matrix, spectrum(matrix, _plain(matrix))


@dataclass(frozen=True)
class _Parts:
    """The metric of each of two cores, of which a metric is taken to be the product."""

    outer: Metric
    inner: Metric

    @staticmethod
    def of(metric: Metric, cut: tuple[int, int, int, int]) -> _Parts:
        a, b, _, _ = cut
        (own,) = metric.left
        left, right = _factors(own, a), _factors(metric.right, b)
        return _Parts(Metric((left[0],), right[0]), Metric((left[1],), right[1]))


def _factors(factor: Tensor, outer: int) -> tuple[Tensor, Tensor]:
    """Roots of the partial traces [outer, ..] and [inner, ..] of the moment with this root, their product as large."""
    if factor.ndim == 1:
        parts = factor.square().reshape(outer, -1)
        first, second = parts.sum(1), parts.sum(0) / parts.sum()
    else:
        parts = (factor @ factor.T).reshape(outer, len(factor) // outer, outer, -1)
        first = torch.einsum("icjc->ij", parts)
        second = torch.einsum("icid->cd", parts) / first.trace()
    return root(first, ROUNDING), root(second, ROUNDING)


def _unweighted(metric: Metric, cores: Tensor) -> Tensor:
    """L^-T X R^-1 of every X [p, q] in ``cores`` [p, q, r]."""
    rows = metric.unleft(cores.flatten(1)).view_as(cores).mT
    return metric.unright(rows.reshape(-1, rows.shape[-1])).view_as(rows).mT


def _plain(matrix: Tensor) -> Metric:
    return Metric((matrix.new_ones(len(matrix)),), matrix.new_ones(matrix.shape[1]))


def _divisor(size: int) -> int:
    """The divisor of ``size`` that is nearest to its square root, by ratio."""
    found = (part for part in range(1, size + 1) if size % part == 0)
    return min(found, key=lambda part: (abs(math.log(part * part / size)), part))


@dataclass(frozen=True)
class TwoCores(Approximation):
    """A_k as ``first`` [a, b, r], B_k as ``second`` [c, r, d]."""

    first: Tensor
    second: Tensor

    def matrix(self) -> Tensor:
        made = torch.einsum("abr,crd->acbd", self.first.double(), self.second.double())
        return made.flatten(2).flatten(0, 1)

    def stored(self, keep: Keep, place: Place, bias: Tensor | None) -> Stored:
        storage = place.params[0].storage
        parts = {"inner": self.second.flatten(0, 1), "outer": self.first.flatten(1)}
        inner, outer = (keep(f"{place.name}.{name}", part.to(storage)) for name, part in parts.items())
        return StoredTrain(inner, outer, None, None if bias is None else keep(f"{place.name}.bias", bias.to(storage)))


class StoredTrain(Stored):
    """``first`` [c r, d] makes c r numbers of each of the b parts of an input, ``second`` [a, b r] outputs of these."""

    def write(self, graph: Graph, place: Place) -> None:
        assert isinstance(place, Train)
        (a, b, c, d), name = place.cut, place.name
        rank = self.first.shape[0] // c
        users = list(graph.params[place.params[0].name].users)
        inner = graph.add_param(f"{name}.inner.weight", self.first)
        outer = graph.add_param(f"{name}.outer.weight", self.second)
        bias = shift(graph, name, self.bias)
        for node in users:
            line = Line(graph, node, name)
            parts = line.linear(line.shaped(node.input(0), 1, b, d), inner)  # [.., b, c r]
            turned = line.swapped(line.shaped(parts, 1, c, rank), -3, -2)  # [.., c, b, r]
            made = line.linear(line.shaped(turned, 2, b * rank), outer)  # [.., c, a]
            line.end(line.add(line.shaped(line.swapped(made, -2, -1), 2, a * c), bias))
        graph.prune()
