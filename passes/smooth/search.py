"""Which numbers to divide channels by: published formulas, and the minimum of the expected rounding error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.rewrite.labels import FREE
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import Expr, load
from compiler.weights.ops.quant import quantise
from compiler.weights.source import MemorySource

if TYPE_CHECKING:
    from passes.smooth import Smooth

GRID = 20  # exponents of awq that are tried
ROWS = 512  # of a matrix on which s is chosen
PARTS = (0.25, 0.5, 0.75, 1.0)  # of the logarithm of the minimum that are tried
STEPS = 40  # of the minimisation
BOUND = math.log2(1e4)  # of log s: more is no help in any storage dtype


@dataclass(frozen=True)
class Matrix:
    """A matrix that reads the channels, float32, in part: rows [r, in] with what errors of each cost, [r].

    ``second`` [in, in] is the second moment of what enters, ``magnitude`` and ``largest`` [in] are mean and maximum of
    its size; ``labels`` [in] say by which s a column is multiplied, ``exponent`` how often. ``scales`` is the dtype
    that scales of groups are stored in.
    """

    rows: Tensor
    costs: Tensor
    second: Tensor
    magnitude: Tensor
    largest: Tensor
    labels: Tensor
    exponent: float
    scales: torch.dtype

    def columns(self, s: Tensor) -> Tensor:
        """What every column is multiplied by, for s [size]."""
        return torch.where(self.labels == FREE, 1.0, s[self.labels.clamp_min(0)] ** self.exponent)

    def lost(self, changed: Tensor) -> float:
        """What ``changed`` rows lose: 1/2 sum of the rows' cost times e C e^T."""
        error = changed - self.rows
        return 0.5 * float(((error @ self.second * error).sum(1).double() * self.costs).sum())


@dataclass(frozen=True)
class Choice:
    """s [size], float64, and what rounding costs with it."""

    s: Tensor
    cost: float


def choices(matrices: Sequence[Matrix], size: int, wanted: Smooth) -> dict[str, Choice]:
    """The best s of every method up to the one that is ``wanted``, and `none`, which is 1."""

    def priced(s: Tensor) -> Choice:
        return Choice(s, lost(matrices, s, wanted))

    found = {"none": priced(torch.ones(size, dtype=torch.float64))}
    if wanted.method == "smoothquant":  # which is for activations as well, so no error of weights can choose
        read, own = _largest(matrices, size)
        return {**found, "smoothquant": priced(finished(read**wanted.alpha / own ** (1 - wanted.alpha), wanted))}
    magnitude = _mean(matrices, size)
    grid = [priced(finished(magnitude ** (step / GRID), wanted)) for step in range(1, GRID + 1)]
    found["awq"] = min([found["none"], *grid], key=_cost)
    if wanted.method == "fit":
        logarithm = fitted(matrices, size, wanted.group)
        parts = [priced(finished((part * logarithm).exp(), wanted)) for part in PARTS]
        found["fit"] = min([found["awq"], *parts], key=_cost)
    return found


def _cost(choice: Choice) -> float:
    return choice.cost


def finished(s: Tensor, wanted: Smooth) -> Tensor:
    """s with a geometric mean of 1, within bounds, float64; a channel that nothing enters gets 1."""
    seen = (s > 0) & s.isfinite()
    logarithm = torch.where(seen, s.double().clamp_min(1e-300).log2(), 0.0)
    logarithm = torch.where(seen, logarithm - logarithm[seen].mean(), 0.0) if bool(seen.any()) else logarithm
    logarithm = logarithm.clamp(-BOUND, BOUND)
    return (logarithm.round() if wanted.powers_of_two else logarithm).exp2()


def lost(matrices: Sequence[Matrix], s: Tensor, wanted: Smooth) -> float:
    """What rounding costs all matrices with their columns scaled by s."""
    total = 0.0
    for matrix in matrices:
        columns = matrix.columns(s).float()
        total += matrix.lost(rounded(matrix.rows * columns, wanted, matrix.scales) / columns)
    return total


def rounded(rows: Tensor, wanted: Smooth, scales: torch.dtype) -> Tensor:
    """``rows`` [r, in] after the rounding that follows."""
    source = MemorySource({"rows": rows})
    expr = quantised(load("rows", "rows", source.types["rows"]), wanted, scales)
    return evaluate([expr], {"rows": source})[0].float()


def quantised(expr: Expr, wanted: Smooth, scales: torch.dtype) -> Expr:
    """``expr`` as the rounding that follows makes it."""
    return quantise(expr, wanted.bits, wanted.group, symmetric=wanted.symmetric, scale_dtype=scales)


def _mean(matrices: Sequence[Matrix], size: int) -> Tensor:
    """The mean magnitude of every channel."""
    total, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for matrix in matrices:
        used = matrix.labels != FREE
        total.index_add_(0, matrix.labels[used], matrix.magnitude[used].double())
        count.index_add_(0, matrix.labels[used], torch.ones(int(used.sum()), dtype=torch.float64))
    return total / count.clamp_min(1)


def _largest(matrices: Sequence[Matrix], size: int) -> tuple[Tensor, Tensor]:
    """The largest magnitude of every channel, and of the weights that read it."""
    found = torch.zeros(2, size, dtype=torch.float64)
    for matrix in matrices:
        used = matrix.labels != FREE
        for row, values in zip(found, (matrix.largest, matrix.rows.abs().amax(0)), strict=True):
            row.scatter_reduce_(0, matrix.labels[used], values[used].double(), "amax")
    return found[0], found[1]


def fitted(matrices: Sequence[Matrix], size: int, group: int) -> Tensor:
    """log s of the least expected error, float64 [size].

    A group of columns G has steps in proportion to max |w_j| s_j, and each of its elements an error as large as a step,
    over s_j; so a row costs the sum over groups of max_j (w_j s_j)^2 * sum_k C_kk / s_k^2. That is a sum of maxima of
    exponentials of linear functions of log s, and convex in it.
    """
    logarithm = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    steps = torch.optim.LBFGS([logarithm], lr=1, max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")
    scale = float(_expected(matrices, logarithm.detach(), group).clamp_min(1e-300))

    def closure() -> Tensor:
        steps.zero_grad()
        loss = _expected(matrices, logarithm, group) / scale
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return loss

    steps.step(closure)  # pyright: ignore[reportArgumentType]
    return logarithm.detach()


def _expected(matrices: Sequence[Matrix], logarithm: Tensor, group: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for matrix in matrices:
        columns = matrix.columns(logarithm.exp()).float()
        width = len(columns)
        count = width // group if group else 1
        steps = (matrix.rows * columns).abs().reshape(-1, count, width // count).amax(-1).square()
        noise = (matrix.second.diagonal() / columns.square()).reshape(count, -1).sum(1)
        total = total + (matrix.costs.float() @ steps @ noise).double()
    return total
