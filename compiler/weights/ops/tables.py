"""Tables of least squared error for the numbers of groups, each by itself.

Both kinds start from one bit and grow bit by bit, and from even steps over the range. What one bit less can say, as it
would be stored, is always among the candidates: more bits never cost more.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

STEPS = 12  # of Lloyd's method
TURNS = 4  # of least squares and codes
RIDGE = 1e-6  # of the mean of the equations' diagonal
ELEMENTS = 1 << 20  # of features that are held together


def means_tables(values: Tensor, weights: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """k-means: tables [rows, 2^bits] in ``dtype`` for ``values`` float32 [rows, n], with ``weights`` [rows, n]."""
    line = _Line(values, weights)
    grown = line.means(line.ends())
    best = grown.to(dtype)
    for level in range(1, bits + 1):
        grown = line.settled(line.split(grown))
        even = line.even(1 << level)
        candidates = (best.repeat_interleave(2, -1), grown.to(dtype), even.to(dtype), line.settled(even).to(dtype))
        best = _least([(each, line.error(each)) for each in candidates])
    return best


def linear_tables(values: Tensor, weights: Tensor | None, bits: int, dtype: torch.dtype) -> Tensor:
    """An offset and a number a bit: tables [rows, bits + 1] in ``dtype`` for ``values`` float32 [rows, n]."""
    step = max(1, ELEMENTS // (values.shape[1] << bits))
    given = weights if weights is not None else torch.ones(())
    parts = zip(values.split(step), given.expand_as(values).split(step), strict=True)
    return torch.cat([_linear(rows, own, bits, dtype) for rows, own in parts])


class _Line:
    """Rows of numbers in order, with sums over the first so many of each: clusters are runs of neighbours."""

    def __init__(self, values: Tensor, weights: Tensor | None) -> None:
        self.sorted, order = values.double().sort(-1)
        weight = torch.ones_like(self.sorted) if weights is None else weights.double().gather(-1, order)
        weight = weight / weight.mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        sums = (weight, weight * self.sorted, weight * self.sorted.square())
        self.sums = [torch.nn.functional.pad(part.cumsum(-1), (1, 0)) for part in sums]

    def ends(self) -> Tensor:
        """The bounds [rows, 2] of one cluster of all."""
        bounds = torch.tensor([0, self.sorted.shape[1]])
        return bounds.expand(len(self.sorted), 2)

    def bounds(self, centers: Tensor) -> Tensor:
        """Where the numbers nearest to each of ``centers`` [rows, k], in order, begin and end: [rows, k + 1]."""
        between = (centers[:, 1:] + centers[:, :-1]) / 2
        inner = torch.searchsorted(self.sorted, between.contiguous())
        first, last = self.ends().split(1, 1)
        return torch.cat([first, inner, last], 1)

    def means(self, bounds: Tensor, otherwise: Tensor | None = None) -> Tensor:
        """The mean of each cluster [rows, k]; ``otherwise`` where it is empty."""
        weight, total = (part.gather(-1, bounds).diff(dim=-1) for part in self.sums[:2])
        known = weight > 0
        means = total / weight.where(known, 1.0)
        return means if otherwise is None else means.where(known, otherwise)

    def settled(self, centers: Tensor) -> Tensor:
        """``centers`` after Lloyd's method."""
        for _ in range(STEPS):
            centers = self.means(self.bounds(centers), centers)
        return centers

    def split(self, centers: Tensor) -> Tensor:
        """Two centers for each: the means of what lies below and above it in its cluster."""
        bounds = self.bounds(centers)
        middle = torch.searchsorted(self.sorted, centers.contiguous()).clamp(bounds[:, :-1], bounds[:, 1:])
        pairs = torch.stack([bounds[:, :-1], middle], -1).flatten(-2)
        return self.means(torch.cat([pairs, bounds[:, -1:]], 1), centers.repeat_interleave(2, -1))

    def even(self, count: int) -> Tensor:
        """``count`` numbers from the least to the largest in even steps."""
        places = torch.linspace(0, 1, count, dtype=torch.float64)
        return torch.lerp(self.sorted[:, :1], self.sorted[:, -1:], places)

    def error(self, table: Tensor) -> Tensor:
        """The squared error of rounding to ``table``, which is in order: [rows]."""
        table = table.double()
        weight, total, squares = (part.gather(-1, self.bounds(table)).diff(dim=-1) for part in self.sums)
        return (squares - 2 * table * total + table.square() * weight).sum(-1)


def _linear(values: Tensor, weights: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    best = ((values * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1e-30)).to(dtype)
    for level in range(1, bits + 1):
        wider = torch.nn.functional.pad(best, (0, 1))
        found = [(wider, _cost(values, weights, wider))]
        for room in (1.0, 0.7):
            middle, half = (low + high) / 2, (high - low) / 2 * room
            steps = 2 * half / ((1 << level) - 1) * (1 << torch.arange(level))
            found += list(_fitted(values, weights, torch.cat([middle - half, steps], 1), dtype))
        best = _least(found)
    return best


def _fitted(values: Tensor, weights: Tensor, table: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """``table`` and what it becomes by least squares in turns with codes, as stored, with their errors."""
    for turn in range(TURNS):
        stored = table.to(dtype)
        yield stored, _cost(values, weights, stored)
        if turn + 1 < TURNS:
            table = _least_squares(values, weights, table)


def _places(values: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """The bits of the nearest codes, with a one before them [rows, n, numbers], and their errors [rows, n]."""
    bits = table.shape[1] - 1
    each = torch.arange(1 << bits)[:, None] >> torch.arange(bits) & 1
    every = torch.nn.functional.pad(each.float(), (1, 0), value=1.0)
    entries, order = (table.float() @ every.mT).to(table.dtype).float().sort(-1)
    between = (entries[:, 1:] + entries[:, :-1]) / 2
    index = torch.searchsorted(between, values.contiguous())
    return every[order.gather(-1, index)], values - entries.gather(-1, index)


def _cost(values: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    return (_places(values, table)[1].square() * weights).sum(-1)


def _least_squares(values: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """The numbers of least squared error with the codes nearest by ``table``; those that do not matter stay."""
    features, error = _places(values, table)
    weighted = features * weights.unsqueeze(-1)
    equations = (weighted.mT @ features).double()
    aims = (weighted.mT @ error.unsqueeze(-1)).double()
    diagonal = equations.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + torch.finfo(torch.float32).tiny
    return table + torch.linalg.solve(equations, aims).squeeze(-1).float()


def _least(candidates: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of tables [rows, k] and their errors [rows], row by row the first of least error."""
    tables, errors = (torch.stack(parts) for parts in zip(*candidates, strict=True))
    return tables.gather(0, errors.argmin(0)[None, :, None].expand(1, -1, tables.shape[-1]))[0]
