"""One first factor for several matrices that meet different inputs, a second factor for each of them.

Matrix l is W_l [m_l, n] and becomes U_l V. An error E_l of it costs 1/2 tr(M_l E_l C_l E_l^T). If all C_l were one C
but for their scale, the best V would be the leading right singular vectors of the stacked L_l^T W_l R: C is the mean of
the C_l over their own scale, weighted by what the matrices have to lose (Basis Sharing, arXiv 2410.03765, sums them).
Given V, the best U_l is W_l C_l V^T (V C_l V^T)^-1 whatever M_l is; the costs told here are those of it, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.factor import ROUNDING, Metric, root


@dataclass(frozen=True)
class Member:
    """A matrix [m, n] float64 and what an error in it costs."""

    weight: Tensor
    metric: Metric


Members = Callable[[], Iterable[Member]]
"""Makes the matrices one at a time: those of many experts do not fit in memory together."""


@dataclass(frozen=True)
class Basis:
    """``vectors`` [k, n]: the first r of them are V of rank r. ``costs`` [k]: what each of them saves."""

    vectors: Tensor
    costs: Tensor


def basis(members: Members) -> Basis:
    """The directions of the inputs of all ``members``, the most useful first."""
    vectors = leading(members)
    costs = sum((_saved(member, vectors) for member in members()), torch.zeros(len(vectors), dtype=torch.float64))
    return Basis(vectors, costs)


def seconds(members: Members, first: Tensor) -> Iterator[Tensor]:
    """The best second factor [m, r] of each matrix beside ``first`` [r, n], float64."""
    for member in members():
        orthonormal, triangle = reduced(member.metric, first.double())
        seen = member.metric.seen(member.weight) @ orthonormal
        yield torch.linalg.solve_triangular(triangle.T, seen, upper=False, left=False)


def leading(members: Members) -> Tensor:
    """Rows [k, n], most worth first, for a first factor of all ``members``; k is at most the rows these have."""
    wanted = second = torch.zeros(())
    height = 0
    for member in members():
        own = _second(member.metric)
        scale = float(own.diagonal().mean() if own.ndim == 2 else own.mean())
        felt = member.metric.felt(member.weight)
        second = second + own * (float(member.metric.errors(member.weight).square().sum()) / scale)
        wanted = wanted + scale * felt.T @ felt
        height += len(member.weight)
    metric = Metric((), root(second, ROUNDING))
    directions = torch.linalg.eigh(metric.seen(metric.seen(wanted).T)).eigenvectors.flip(1)
    return metric.unright(directions.T[: min(height, len(directions))])


def _second(metric: Metric) -> Tensor:
    """C [n, n], or its diagonal [n]."""
    return metric.right @ metric.right.T if metric.right.ndim == 2 else metric.right.square()


def _saved(member: Member, vectors: Tensor) -> Tensor:
    """What each of ``vectors`` saves of the cost of having none, after those before it."""
    orthonormal, _ = reduced(member.metric, vectors)
    return 0.5 * (member.metric.errors(member.weight) @ orthonormal).square().sum(0)


def reduced(metric: Metric, first: Tensor) -> tuple[Tensor, Tensor]:
    """Q [n, r] and T [r, r] with V R = T^T Q^T: columns of Q span what the rows of V see, in their order."""
    orthonormal, triangle = torch.linalg.qr(metric.seen(first).T)
    return orthonormal, triangle
