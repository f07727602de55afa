"""Dense times semi-structured sparse factors (DSFormer, arXiv 2312.13211).

W [m, n] becomes D S with D [m, r] dense and S [r, n] 2:4-sparse: two of each four consecutive inputs of a row. S grows
some rows at a time. They start as the directions of the inputs along which most of the error is that is left, keep two
of four of their elements, the largest by what their inputs weigh, and these are fitted to the direction. What their
span takes of the error is gone, as D is the best there is beside S: rows before never change, more never cost more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.factor import ROUNDING, Metric, root
from compiler.ir.graph import Param
from compiler.masked import fitted, of_each
from compiler.weights.ops.sparse import mask_width, packed, scatter, unpacked
from passes.low_rank.forms import Approximation, Structured, meta
from passes.low_rank.places import Place
from passes.low_rank.rewrite import Keep, Stored

KEPT, OF = 2, 4
BLOCK = 32  # rows that S grows by
TURNS = 3  # of the iteration that finds the directions with most of an error


class DenseSparse(Structured):
    """A linear map whose first factor is sparse."""

    @property
    def most(self) -> int:
        """As many rows as there are inputs, two of four elements of each, span all of them."""
        return self.columns

    @property
    def words(self) -> str:
        return "dense times 2:4-sparse"

    def numbers(self, rank: int) -> int:
        """The bits that say which elements of the sparse factor remain count as what they take."""
        mask = -(-rank * mask_width(self.columns) // self.params[0].storage.itemsize)
        return rank * self.height + rank * self.columns * KEPT // OF + mask

    def costs(self, weight: Tensor, metric: Metric) -> Tensor:
        """Of ranks that hold more numbers than the weight only the sum is told, at the last of them."""
        paying = max((rank for rank in range(self.most) if self.numbers(rank) <= self.full), default=0)
        _, saved = _grown(weight, metric, paying)
        rest = metric.cost(weight) - float(saved.sum())
        return torch.cat([saved, saved.new_zeros(self.most - paying - 1), saved.new_tensor([max(rest, 0.0)])])

    def approximated(self, weight: Tensor, metric: Metric, rank: int) -> Approximation:
        dtype = self.params[0].storage
        rows, _ = _grown(weight, metric, rank)
        kept = of_each(rows.abs(), KEPT, OF)
        values = rows[kept].view(rank, -1).to(dtype)
        sparse = torch.zeros_like(rows).masked_scatter_(kept, values.double())
        seen = metric.seen(sparse)
        dense = torch.cholesky_solve(seen @ metric.seen(weight).T, root(seen @ seen.T, ROUNDING)).T
        return Product(packed(kept), values, dense.to(dtype))

    def empty(self, rank: int) -> Approximation:
        mask = meta(rank, mask_width(self.columns), dtype=torch.uint8)
        return Product(mask, meta(rank, self.columns * KEPT // OF), meta(self.height, rank))


def obstacle(param: Param) -> str:
    """Why the columns of ``param`` make no groups; "" when they do."""
    columns = int(param.shape[1])
    return f"its {columns} inputs do not divide into groups of {OF}" if columns % OF else ""


def _grown(weight: Tensor, metric: Metric, rank: int) -> tuple[Tensor, Tensor]:
    """The rows of S [rank, n], and what each of them saves of the cost."""
    left, second = metric.errors(weight), _second(metric)
    rows, span, saved = weight.new_zeros(0, len(second)), weight.new_zeros(len(second), 0), weight.new_zeros(0)
    draw = torch.Generator().manual_seed(0)
    while len(rows) < rank:
        wanted = metric.unright(_largest(left, draw))
        kept = of_each(wanted.abs() * second.diagonal().sqrt(), KEPT, OF)
        more = fitted(wanted, second, kept, wanted * kept)
        added = _orthonormal(metric.seen(more).T, span)
        along = left @ added
        rows, span, saved = torch.cat([rows, more]), torch.cat([span, added], 1), torch.cat([saved, _energy(along)])
        left = left - along @ added.T
    return rows[:rank], saved[:rank]


def _second(metric: Metric) -> Tensor:
    return metric.right @ metric.right.T if metric.right.ndim == 2 else metric.right.square().diag()


def _energy(along: Tensor) -> Tensor:
    return 0.5 * along.square().sum(0)


def _largest(error: Tensor, draw: torch.Generator) -> Tensor:
    """Orthonormal rows [k, n] along which most of ``error`` [m, n] is, nearly, those with most of it first."""
    count = min(BLOCK, *error.shape)
    found = torch.randn(error.shape[1], count, generator=draw, dtype=error.dtype)
    for _ in range(TURNS):
        found = torch.linalg.qr(error.T @ (error @ found)).Q
    return (found @ torch.linalg.eigh((error @ found).T @ (error @ found)).eigenvectors.flip(1)).T


def _orthonormal(columns: Tensor, span: Tensor) -> Tensor:
    """An orthonormal basis of what ``columns`` [n, k] add to ``span`` [n, s], as far as their number and n allow."""
    for _ in range(2):
        columns = columns - span @ (span.T @ columns)
    return torch.linalg.qr(columns).Q


@dataclass(frozen=True)
class Product(Approximation):
    """The ``mask`` of S [r, n], the ``values`` [r, n / 2] that remain of it, and ``dense`` [m, r]."""

    mask: Tensor
    values: Tensor
    dense: Tensor

    @property
    def columns(self) -> int:
        return self.values.shape[1] * OF // KEPT

    def matrix(self) -> Tensor:
        kept = unpacked(self.mask, self.columns)
        sparse = torch.zeros(kept.shape, dtype=torch.float64)
        return self.dense.double() @ sparse.masked_scatter_(kept, self.values.double())

    def stored(self, keep: Keep, place: Place, bias: Tensor | None) -> Stored:
        storage = place.params[0].storage
        mask = keep(f"{place.name}.mask", self.mask)
        values = keep(f"{place.name}.values", self.values.to(storage))
        dense = keep(f"{place.name}.second", self.dense.to(storage))
        shifted = None if bias is None else keep(f"{place.name}.bias", bias.to(storage))
        return Stored(scatter(mask, values, self.columns), dense, None, shifted)
