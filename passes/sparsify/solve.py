"""One matrix made sparse: which elements remain, and what they become.

What is minimised is the sum over rows r of g_r e_r H e_r^T, e_r being the rows of the error, H the damped second moment
of what enters and g_r what an error of output r costs. `magnitude` and `wanda` (arXiv 2306.11695) choose by scores and
leave what remains as it is. `sparsegpt` (arXiv 2301.00774) goes through the columns, block by block, and lets the
columns after each make up for what it lost; here what remains is then fitted once more, all columns at a time, by
conjugate gradients, no step of which can raise the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compiler.errors import PassError
from compiler.masked import fitted, of_each
from passes.sparsify.masks import largest, largest_by_row
from passes.sparsify.places import Part, Pattern

DAMPING = 0.01  # of the mean energy of inputs
BLOCK = 128  # columns of which the elements that remain are chosen together
STEPS = 8  # parts of a small matrix: each is also grown from the one below it
SMALL = 1 << 16  # elements


@dataclass(frozen=True)
class Problem:
    """A matrix float64 [rows, columns], the second moment H [columns, columns] of its inputs, damped, and g [rows]."""

    weight: Tensor
    second: Tensor
    rows: Tensor

    def cost(self, sparse: Tensor) -> float:
        """What ``sparse`` in the place of the weight costs."""
        error = self.weight - sparse
        return float((error @ self.second * error).sum(-1) @ self.rows)

    @cached_property
    def factor(self) -> Tensor:
        """The upper Cholesky factor of the inverse of H. Raises PassError when that has none."""
        lower, failed = torch.linalg.cholesky_ex(self.second)
        if failed:
            raise PassError(
                "second moments of inputs are no finite numbers", remedy="look at the model's activations on this data"
            )
        return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)

    def saliency(self) -> Tensor:
        """What each element costs, were it alone to go and the rest of its row to make up for it: [rows, columns]."""
        inverse = self.factor.square().sum(0)  # the diagonal of U^T U
        return self.rows[:, None] * self.weight.square() / inverse


def damped(second: Tensor) -> Tensor:
    """``second`` [columns, columns] with damping; the identity where nothing was seen."""
    ridge = DAMPING * float(second.diagonal().mean())
    ones = torch.eye(len(second), dtype=second.dtype)
    return second + ridge * ones if ridge else ones


def solve(problem: Problem, method: str, part: Part) -> tuple[Tensor, Tensor]:
    """Which elements remain (bool), and the sparse matrix (float64), both [rows, columns]."""
    if method == "sparsegpt":
        return surgeon(problem, part)
    kept = largest(problem.weight.abs(), part) if method == "magnitude" else _wanda(problem, part)
    return kept, problem.weight * kept


def _wanda(problem: Problem, part: Part) -> Tensor:
    return largest_by_row(problem.weight.square() * problem.second.diagonal(), part)


def surgeon(problem: Problem, part: Part) -> tuple[Tensor, Tensor]:
    """SparseGPT, fitted; never worse than what `wanda` keeps as it is, nor, of a small matrix, than a smaller part.

    Choices made in the order of columns can cost more where more may remain, if there are few of them: over many they
    average out. So a part of a small matrix is also grown from the step below it, whose elements remain: fitting from
    there costs no more than that step did.
    """
    found = _chosen(problem, part)
    less = _step_below(part, problem.weight.numel())
    if less is None or problem.weight.numel() > SMALL:
        return found
    kept, sparse = surgeon(problem, less)
    gain = problem.rows[:, None] * ((problem.weight - sparse) @ problem.second).square() / problem.second.diagonal()
    scores = gain.masked_fill(kept, torch.inf)
    more = of_each(scores, part.kept, part.of) if isinstance(part, Pattern) else largest(scores, part)
    grown = fitted(problem.weight, problem.second, more, sparse)
    return (more, grown) if problem.cost(grown) < problem.cost(found[1]) else found


def _step_below(part: Part, whole: int) -> Part | None:
    """The next smaller part that a solution is grown from; None below the first."""
    if isinstance(part, Pattern):
        return Pattern(part.kept - 1, part.of) if part.kept > 1 else None
    steps = {round(whole * step / STEPS) for step in range(1, STEPS)}
    return max((step for step in steps if 0 < step < part), default=None)


def _chosen(problem: Problem, part: Part) -> tuple[Tensor, Tensor]:
    kept, sparse = _in_order(problem, part)
    other = _wanda(problem, part)
    plain = problem.weight * other
    sparse = fitted(problem.weight, problem.second, kept, sparse)
    if problem.cost(plain) < problem.cost(sparse):
        return other, fitted(problem.weight, problem.second, other, plain)
    return kept, sparse


def _in_order(problem: Problem, part: Part) -> tuple[Tensor, Tensor]:
    weight, factor = problem.weight.clone(), problem.factor
    columns = weight.shape[1]
    kept = torch.zeros_like(weight, dtype=torch.bool)
    width = BLOCK if isinstance(part, int) else BLOCK - BLOCK % part.of or part.of
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block, inner = weight[:, start:stop], factor[start:stop, start:stop]
        share = part
        if isinstance(part, int):
            share = part * stop // columns - part * start // columns
            kept[:, start:stop] = largest(problem.rows[:, None] * (block / inner.diagonal()).square(), share)
        errors = _block(block, inner, kept[:, start:stop], share)
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return kept, weight


def _block(block: Tensor, factor: Tensor, kept: Tensor, part: Part) -> Tensor:
    """Take columns of ``block`` out in order, in place. Returns what each lost [rows, columns], over its pivot.

    Of a pattern, ``kept`` is chosen group by group, on the way.
    """
    errors = torch.zeros_like(block)
    for column in range(block.shape[1]):
        if isinstance(part, Pattern) and column % part.of == 0:
            group = slice(column, column + part.of)
            kept[:, group] = of_each((block[:, group] / factor.diagonal()[group]).square(), part.kept, part.of)
        errors[:, column] = block[:, column] * ~kept[:, column] / factor[column, column]
        block[:, column + 1 :] -= torch.outer(errors[:, column], factor[column, column + 1 :])
        block[:, column] *= kept[:, column]
    return errors
