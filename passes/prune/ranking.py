"""Which indices of a place go first, and what the model loses with each of them.

The projection y = W x reads the place. Without the columns R, the others S make up for them best, under the second
moments C of x, by W' = W C[:,S] C[S,S]^-1 (the Nystroem approximation, MoDeGPT, arXiv 2408.09632); what remains of the
error costs 1/2 tr(M V_R (H_RR)^-1 V_R^T) with H = C^-1 and V the weights so far (optimal brain surgeon; for structures:
ZipLM, arXiv 2302.04089). Indices go a few at a time, the cheapest first, each time with H and V of those that remain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiler.calibration.moments import Moments

RIDGE = 1e-2
"""Of the median energy of inputs: what calibration has hardly seen stays as it is."""
SHRINK = 0.2
"""Of correlations between inputs: on other texts they are weaker, and what makes up for others by them does it less."""
GRADIENT_RIDGE = 1e-6
STEPS = 96
"""In how many steps all indices of a place go."""


@dataclass(frozen=True)
class Ranking:
    """``order`` of the indices, those to keep longest first; ``losses[k]`` by keeping the first k, in nats (or 0).

    ``rows``: of heads, the order that they get within each of their groups before any goes.
    """

    order: tuple[int, ...]
    losses: Tensor
    rows: tuple[tuple[int, ...], ...] = ()

    def kept(self, count: int) -> list[int]:
        """The ``count`` indices that stay, in their own order."""
        return sorted(self.order[:count])


@dataclass(frozen=True)
class Reader:
    """A matrix [out, in] that reads a place, ``columns[i]`` belonging to index i, and what calibration says of it.

    ``slope`` [channels in]: what the loss changes by without each, to first order.
    """

    weight: Tensor
    columns: Sequence[Sequence[int]]
    moments: Moments | None
    sequence: Sequence[int] = ()
    slope: Tensor | None = None

    def flat(self, indices: Sequence[int]) -> list[int]:
        return [column for index in indices for column in self.columns[index]]

    def remaining(self, indices: Sequence[int]) -> list[int]:
        """The columns of ``indices`` in the order in which they stand when the others are gone."""
        left = set(self.flat(indices))
        return [column for column in (self.sequence or range(self.weight.shape[1])) if column in left]

    def finer(self, outer: int) -> Reader:
        """Every index cut into one for each of ``outer`` groups: group after group."""
        width = len(self.columns[0]) // outer
        heads = [own[group * width : (group + 1) * width] for group in range(outer) for own in self.columns]
        return replace(self, columns=heads)

    def reordered(self, rows: Sequence[Sequence[int]]) -> Reader:
        """Index i is head ``rows[g][i]`` in group g, for all groups at once."""
        heads, size = self.finer(len(rows)).columns, len(rows[0])
        columns = [[c for g, row in enumerate(rows) for c in heads[g * size + row[i]]] for i in range(size)]
        sequence = [c for g, row in enumerate(rows) for head in row for c in heads[g * size + head]]
        return replace(self, columns=columns, sequence=sequence)


def inputs(moments: Moments) -> Tensor:
    """The second moment of what enters, its correlations shrunk, made regular, float64."""
    energies = moments.second.diagonal()
    ridge = RIDGE * float(energies.median()) or RIDGE * float(energies.mean()) or 1.0
    return (1 - SHRINK) * moments.second + torch.diag(SHRINK * energies + ridge)


def surgeon(readers: Sequence[Reader], size: int, given: Sequence[int] | None = None) -> Ranking:
    """Remove the cheapest indices first. ``given`` is an order to take instead, the first to keep longest."""
    parts = [_Remaining.of(reader) for reader in readers]
    alive = list(range(size))
    gone: list[int] = []
    losses = torch.zeros(size + 1, dtype=torch.float64)
    step = 1 if given is not None else max(1, size // STEPS)
    while alive:
        if given is None:
            costs = torch.stack([part.costs() for part in parts]).sum(0)
            chosen: list[int] = costs.argsort()[: min(step, len(alive))].tolist()
        else:
            chosen = [alive.index(given[len(alive) - 1])]
        before = losses[len(alive)]
        lost = sum(part.remove(chosen) for part in parts)
        left = len(alive) - len(chosen)
        losses[left : len(alive)] = before + lost * torch.linspace(1, 1 / len(chosen), len(chosen))
        going = dict.fromkeys(alive[position] for position in chosen)
        gone += going
        alive = [index for index in alive if index not in going]
    return Ranking(tuple(reversed(gone)), losses)


@dataclass
class _Remaining:
    """Of a reader: V [out, n * width] in the metric of M, and H = C^-1, of the n indices that are left, in order."""

    weight: Tensor
    inverse: Tensor
    width: int

    @staticmethod
    def of(reader: Reader) -> _Remaining:
        assert reader.moments is not None  # a score that calibrates has measured it
        flat = reader.flat(range(len(reader.columns)))
        second = inputs(reader.moments)[flat][:, flat]
        weighted = in_metric(reader.weight.double(), reader.moments.gradient)[:, flat]
        return _Remaining(weighted.float(), torch.linalg.inv(second).float(), len(reader.columns[0]))

    def costs(self) -> Tensor:
        """What each index costs, float64 [n]."""
        count = len(self.inverse) // self.width
        blocks = self.inverse.view(count, self.width, count, self.width)
        own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
        columns = self.weight.view(-1, count, self.width).transpose(0, 1).double()
        if self.width == 1:
            return 0.5 * columns.square().sum((1, 2)) / own[:, 0, 0]
        return 0.5 * (torch.linalg.solve(own, columns.transpose(1, 2)) * columns.transpose(1, 2)).sum((1, 2))

    def remove(self, positions: Sequence[int]) -> float:
        """Let the other columns make up for those at ``positions`` among the indices, which go. Returns the cost."""
        flat = [position * self.width + place for position in positions for place in range(self.width)]
        left = torch.ones(len(self.inverse), dtype=torch.bool)
        left[flat] = False
        rows = self.inverse[flat]
        columns = self.weight[:, flat].double()
        solved = torch.linalg.solve(rows[:, flat].double(), torch.cat([rows[:, left].double(), columns.T], 1))
        others = int(left.sum())
        update = solved[:, :others].float()
        self.weight = self.weight[:, left].addmm_(self.weight[:, flat], update, alpha=-1)
        self.inverse = self.inverse[left][:, left].addmm_(rows[:, left].T, update, alpha=-1)
        return 0.5 * float((solved[:, others:] * columns.T).sum())


def in_metric(weight: Tensor, gradient: Tensor | None) -> Tensor:
    """L^T W with M = L L^T. M was summed in float32, so that no fixed ridge makes it positive: the least that does."""
    if gradient is None:
        return weight
    if gradient.ndim == 1:
        return gradient.sqrt()[:, None] * weight
    mean, eye = float(gradient.diagonal().mean()), torch.eye(len(gradient), dtype=gradient.dtype)
    ridge = GRADIENT_RIDGE * mean or 1.0
    factor, failed = torch.linalg.cholesky_ex(gradient + ridge * eye)
    while failed and ridge < mean:
        ridge *= 10
        factor, failed = torch.linalg.cholesky_ex(gradient + ridge * eye)
    return factor.T @ weight


def restored(reader: Reader, kept: Sequence[int]) -> Tensor:
    """The columns of ``kept``, which make up for the others as calibration says: W C[:,S] C[S,S]^-1, float64."""
    columns = reader.remaining(kept)
    if reader.moments is None:
        return reader.weight[:, columns].double()
    second = inputs(reader.moments)
    solved = torch.linalg.solve(second[columns][:, columns], second[columns])
    return reader.weight.double() @ solved.T


def summed(losses: Tensor) -> Ranking:
    """What costs least goes first; several are predicted to cost the sum of their ``losses`` [n]."""
    order = by_size(losses).order
    gone = losses[list(order)].flip(0).cumsum(0).flip(0)
    return Ranking(order, torch.cat([gone, torch.zeros(1, dtype=gone.dtype)]))


def by_size(sizes: Tensor) -> Ranking:
    """The smallest ``sizes`` [n] go first. No loss is predicted."""
    return Ranking(tuple(sizes.argsort(descending=True, stable=True).tolist()), torch.zeros(len(sizes) + 1))
