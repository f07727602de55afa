"""A matrix as a stack of blocks, each of which fits what those before it have left.

An error E of a matrix costs the sum over its rows of c e H e^T, H being the second moment of what enters and c what an
error of the row costs. A block is S * (U V): U V is the product of its rank nearest to the magnitudes of what is left,
rows and columns weighted by the roots of c and of H's diagonal. S takes the signs of what is left, column by column, of
which those to come take up the error so far (GPTQ, arXiv 2210.17323). Each row of U is then scaled by least squares
under H, and a little more, since large elements are what blocks after it do not reach; it is zero where rounding would
leave the row no better: no row of any block ever adds to the cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.errors import PassError
from compiler.weights.ops.stack import FACTOR, Block

DAMPING = 0.01  # of the mean energy of inputs
COLUMNS = 128  # whose errors are carried to the rest together
ELEMENTS = 1 << 22  # of rows that are worked on together
LEAST = 1e-3  # of the mean: weights of rows and columns are no smaller
STRETCH = 1.15  # times the best factor of each row: what a block loses by it, those behind it gain several times
TURNS, MORE = 3, 4  # of the search for leading directions, and how many more of them it looks at


@dataclass(frozen=True)
class Aim:
    """A ``matrix`` float32 [rows, columns], H float64 [columns, columns], and ``costs`` float64 [rows] of rows."""

    matrix: Tensor
    second: Tensor
    costs: Tensor

    def damped(self) -> Tensor:
        """H in float32, damped; the identity where nothing was seen."""
        ridge = DAMPING * float(self.second.diagonal().mean()) or 1.0
        return (self.second + ridge * torch.eye(len(self.second), dtype=self.second.dtype)).float()


@dataclass(frozen=True)
class _Space:
    """H, the order in which columns get signs, largest energy first, and the factor of H's inverse in that order."""

    second: Tensor
    order: Tensor
    factor: Tensor

    def cost(self, error: Tensor) -> Tensor:
        """e H e^T of each row: float64."""
        return (error @ self.second * error).sum(1, dtype=torch.float64)


def decomposed(aim: Aim, rank: int, count: int) -> tuple[list[Block], list[float]]:
    """``count`` blocks, and what is lost with none, one, … of them.

    Raises PassError when H is no positive definite matrix of finite numbers.
    """
    space = _space(aim.damped())
    weights = _roots(aim.costs)[:, None], _roots(aim.second.diagonal())
    left, blocks = aim.matrix.clone(), list[Block]()
    lost = [_total(aim, space, left)]
    for _ in range(count):
        block = _block(left, space, weights, rank)
        left -= block.values()
        blocks.append(block)
        lost.append(_total(aim, space, left))
    return blocks, lost


def _total(aim: Aim, space: _Space, error: Tensor) -> float:
    return sum(float(space.cost(error[part]) @ aim.costs[part]) for part in _parts(error)) / 2


def _parts(matrix: Tensor) -> Iterator[slice]:
    step = max(1, ELEMENTS // matrix.shape[1])
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def _space(second: Tensor) -> _Space:
    order = second.diagonal().argsort(descending=True)
    lower, failed = torch.linalg.cholesky_ex(second[order][:, order])
    if failed or not second.isfinite().all():
        raise PassError(
            "the second moment of what enters a weight is not positive definite", remedy="use other calibration data"
        )
    return _Space(second, order, torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True))


def _roots(weights: Tensor) -> Tensor:
    """float32: the roots of ``weights``, none of which is very small beside their mean."""
    mean = float(weights.mean()) or 1.0
    return (weights / mean).clamp_min(LEAST).sqrt().float()


def _block(left: Tensor, space: _Space, weights: tuple[Tensor, Tensor], rank: int) -> Block:
    """The block that takes most of what is ``left``."""
    rows, columns = weights
    first, second = _leading(left.abs() * rows * columns, rank)
    first, second = first / rows, (second / columns).to(FACTOR)
    if not (first.to(FACTOR).isfinite().all() and second.isfinite().all()):
        raise PassError(
            "a weight is too large for factors in float16", remedy="scale it down, or leave it out with `skip`"
        )
    parts = [_signed(left[part], first[part], second.float(), space) for part in _parts(left)]
    return Block(torch.cat([signs for signs, _ in parts]), torch.cat([scaled for _, scaled in parts]), second)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """[rows, rank] and [rank, columns] whose product is nearest to ``matrix``, by iteration on a subspace."""
    wide = min(rank + MORE, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    basis = torch.rand(matrix.shape[1], wide, generator=generator)
    for _ in range(TURNS):
        basis = torch.linalg.qr(matrix.mT @ torch.linalg.qr(matrix @ basis).Q).Q
    left, values, right = torch.linalg.svd(matrix @ basis, full_matrices=False)
    roots = values[:rank].sqrt()
    first, second = left[:, :rank] * roots, roots[:, None] * (right[:rank] @ basis.mT)
    missing = rank - first.shape[1]
    return torch.nn.functional.pad(first, (0, missing)), torch.nn.functional.pad(second, (0, 0, 0, missing))


def _signed(wanted: Tensor, first: Tensor, second: Tensor, space: _Space) -> tuple[Tensor, Tensor]:
    """For some rows: which elements are negative, and their part of U as stored."""
    size = first @ second
    before = space.cost(wanted)
    choices = [_scaled(wanted, size, signs, space) for signs in (wanted < 0, _fed_back(wanted, size, space))]
    better = choices[1][1] > choices[0][1]
    negative = (choices[1][0].where(better[:, None], choices[0][0])) != (size < 0)
    factor = choices[1][2].where(better, choices[0][2])
    stored = (first * factor[:, None] * STRETCH).to(FACTOR)
    block = Block(negative, stored, second.to(FACTOR))
    helps = space.cost(wanted - block.values()) < before
    return negative, stored.where(helps[:, None], torch.zeros((), dtype=FACTOR))


def _scaled(wanted: Tensor, size: Tensor, negative: Tensor, space: _Space) -> tuple[Tensor, Tensor, Tensor]:
    """The signs, what they gain with the best factor for each row, and these factors."""
    values = torch.where(negative, -size.abs(), size.abs())
    seen = values @ space.second
    met, energy = (seen * wanted).sum(1), (seen * values).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return negative, met.square() / energy, met / energy


def _fed_back(wanted: Tensor, size: Tensor, space: _Space) -> Tensor:
    """Where elements are negative when each column has taken up the errors of those before it."""
    work, size, columns = wanted[:, space.order], size.abs()[:, space.order], len(space.order)
    negative = torch.empty(work.shape, dtype=torch.bool)
    for start in range(0, columns, COLUMNS):
        part = slice(start, min(start + COLUMNS, columns))
        errors = torch.empty(len(work), part.stop - start)
        for column in range(start, part.stop):
            given = work[:, column]
            negative[:, column] = given < 0
            error = (given - size[:, column].copysign(given)) / space.factor[column, column]
            errors[:, column - start] = error
            work[:, column + 1 : part.stop] -= torch.outer(error, space.factor[column, column + 1 : part.stop])
        work[:, part.stop :] -= errors @ space.factor[part, part.stop :]
    return negative[:, space.order.argsort()]
