"""The best matrix of a rank by a metric, and its factors.

An error E of W costs 1/2 tr(M E C E^T) = 1/2 |L^T E R|^2 with M = L L^T and C = R R^T (Cholesky). The best matrix of
rank r truncates the singular values of S = L^T W R, and its cost is half the sum of the squares of those that are
dropped. They are found as eigenvalues of the smaller of S S^T and S^T S, all in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compiler.calibration.moments import Moments
from compiler.errors import PassError

INPUT_RIDGE = 1e-5  # of the mean energy, so that what calibration never saw does not come for free
GRADIENT_RIDGE = 1e-2
SHRINK = 0.1  # of correlations between inputs: they are weaker on texts of other kinds than calibration's
ROUNDING = 1e-12


@dataclass(frozen=True)
class Metric:
    """L of each block of rows, lower triangular [m, m] or the diagonal [m] of one, and R [n, n] or [n]."""

    left: tuple[Tensor, ...]
    right: Tensor

    def errors(self, error: Tensor) -> Tensor:
        """L^T E R."""
        return self.seen(self.felt(error))

    def cost(self, error: Tensor) -> float:
        """1/2 tr(M E C E^T) of an error [m, n]."""
        return 0.5 * float(self.errors(error).square().sum())

    def seen(self, matrix: Tensor) -> Tensor:
        """X R: rows of X [.., n] as they look on unit inputs."""
        return matrix @ self.right if self.right.ndim == 2 else matrix * self.right

    def felt(self, matrix: Tensor) -> Tensor:
        """L^T X."""
        parts = matrix.split([len(block) for block in self.left])
        return torch.cat([_times(block, part) for block, part in zip(self.left, parts, strict=True)])

    def unleft(self, matrix: Tensor) -> Tensor:
        """L^-T X."""
        parts = matrix.split([len(block) for block in self.left])
        return torch.cat([_solved(block, part) for block, part in zip(self.left, parts, strict=True)])

    def unright(self, matrix: Tensor) -> Tensor:
        """X R^-1."""
        return matrix / self.right if self.right.ndim == 1 else _solved(self.right, matrix.T).T


def _times(block: Tensor, part: Tensor) -> Tensor:
    return block.T @ part if block.ndim == 2 else block[:, None] * part


def _solved(block: Tensor, part: Tensor) -> Tensor:
    """B^-T X of a lower triangular or diagonal B."""
    return torch.linalg.solve_triangular(block.T, part, upper=True) if block.ndim == 2 else part / block[:, None]


Kind = Literal["loss", "input", "scaled", "plain"]
"""What a metric knows: M and C, C, the sizes of inputs, or nothing."""


def left_of(kind: Kind, gradient: Tensor | None, rows: int) -> Tensor:
    """L of the moment M of gradients at ``rows`` outputs, or of 1."""
    if gradient is None or kind != "loss":
        return torch.ones(rows, dtype=torch.float64)
    return root(gradient, GRADIENT_RIDGE)


def right_of(kind: Kind, inputs: Moments, centred: bool = False) -> Tensor:
    """R of the moment C of ``inputs``, correlations shrunk, about their mean if ``centred``; or what ``kind`` says."""
    if kind == "plain":
        return torch.ones_like(inputs.mean)
    if kind == "scaled":
        return root(inputs.second.diagonal(), INPUT_RIDGE).sqrt()
    mean = inputs.mean if centred else torch.zeros_like(inputs.mean)
    moment = inputs.second - torch.outer(mean, mean)
    return root((1 - SHRINK) * moment + SHRINK * moment.diagonal().diag(), INPUT_RIDGE)


def root(matrix: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of a moment [n, n], ``ridge`` of its mean diagonal added; the root of a diagonal [n].

    Rounding can leave eigenvalues further below zero than the ridge lifts them: it then grows. Raises PassError when
    the moment holds what is no number.
    """
    if not matrix.isfinite().all():
        raise PassError("calibration gives values that are no finite numbers", remedy="check the model and its data")
    if matrix.ndim == 1:
        return (matrix + ridge * _mean(matrix)).sqrt()
    factor, failed = torch.linalg.cholesky_ex(matrix + ridge * _mean(matrix.diagonal()) * torch.eye(len(matrix)))
    return root(matrix, 10 * max(ridge, ROUNDING)) if failed else factor


def _mean(diagonal: Tensor) -> float:
    return float(diagonal.mean()) or 1.0


@dataclass(frozen=True)
class Spectrum:
    """``costs`` [k]: the cost that each singular direction saves, largest first; ``vectors`` its eigenvectors."""

    costs: Tensor
    vectors: Tensor

    def lost(self, rank: int) -> float:
        """The cost of the best matrix of ``rank``."""
        return float(self.costs[rank:].sum())


def spectrum(weight: Tensor, metric: Metric) -> Spectrum:
    """Of ``weight`` [m, n] float64 under ``metric``."""
    seen = metric.errors(weight)
    gram = seen @ seen.T if len(seen) <= seen.shape[1] else seen.T @ seen
    values, vectors = torch.linalg.eigh(gram)
    return Spectrum(0.5 * values.flip(0).clamp_min(0), vectors.flip(1))


def truncated(weight: Tensor, metric: Metric, found: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """U [m, r] and V [r, n] of the best matrix of ``rank``, float64."""
    kept = found.vectors[:, :rank]
    if len(weight) <= weight.shape[1]:  # the vectors are those of outputs
        return metric.unleft(kept), kept.T @ metric.felt(weight)
    return metric.seen(weight) @ kept, metric.unright(kept.T)


@dataclass(frozen=True)
class Factors:
    """``first`` [r, n] makes r numbers of an input, ``second`` the outputs of these.

    Of a pair, ``second`` is [m, r]. Pivoted, the r numbers are outputs themselves, ``second`` [m - r, r] makes the
    others, and output i stands in place ``order``[i] of both together.
    """

    first: Tensor
    second: Tensor
    order: Tensor | None = None

    def matrix(self) -> Tensor:
        """The matrix [m, n] that the factors stand for."""
        first = self.first.double()
        product = self.second.double() @ first
        return product if self.order is None else torch.cat([first, product])[self.order]


def pair(left: Tensor, right: Tensor, metric: Metric, dtype: torch.dtype) -> Factors:
    """U V as two factors of ``dtype``; the second makes up for the rounding of the first."""
    first = right.to(dtype)
    return Factors(first, _refitted(left, right, first, metric).to(dtype))


def pivoted(left: Tensor, right: Tensor, metric: Metric, dtype: torch.dtype) -> Factors:
    """U V as r of its rows, which partial pivoting finds to span the outputs well, and the others made of these."""
    rank = len(right)
    order = _pivots(left, metric.seen(right))
    pivots, others = order[:rank], order[rank:]
    first = (left[pivots] @ right).to(dtype)
    second = _refitted(left[others], right, first, metric)
    return Factors(first, second.to(dtype), order.argsort())


def _pivots(left: Tensor, seen: Tensor) -> Tensor:
    """The numbers of all rows of U V: first those that span the outputs, in the order of an LU decomposition."""
    outputs = left @ root(seen @ seen.T, ROUNDING)
    _, swaps = torch.linalg.lu_factor(outputs)
    order = list(range(len(left)))
    for row, other in enumerate(swaps.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    return torch.tensor(order)


def _refitted(left: Tensor, right: Tensor, first: Tensor, metric: Metric) -> Tensor:
    """The second factor that, with ``first`` as it is stored, is nearest to U V on the inputs of the metric."""
    stored, wanted = metric.seen(first.double()), metric.seen(right)
    factor = root(stored @ stored.T, ROUNDING)
    return left @ torch.cholesky_solve(stored @ wanted.T, factor).T


def best(weight: Tensor, metric: Metric, rank: int, pivots: bool, dtype: torch.dtype) -> Factors:
    """The factors of the best matrix of ``rank``, pivoted or a pair, stored as ``dtype``."""
    left, right = truncated(weight, metric, spectrum(weight, metric), rank)
    return (pivoted if pivots else pair)(left, right, metric, dtype)
