"""What best stands for the rotation between queries and keys: a complex number for each head and rotary pair.

With u = q conj(k), the product of a query's and a key's pair, the rotated score is Re(u turn), and Re(u c) stands for
it. Under weights w the best c is a least squares in two unknowns. It is not the mean of the turns: what is turned
matters as much as how far, and a key that everybody attends to is unlike the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from passes.gqa_to_mla.source import Source, pair_rows

RIDGE = 1e-3  # of the energy of u: towards the mean turn, which needs fewer data
TINY = torch.finfo(torch.float64).tiny


class Turns:
    """Accumulates what the least squares need, some heads of one sample at a time."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._sums = torch.zeros(source.heads, 5, source.pairs, dtype=torch.complex128)

    def add(self, heads: slice, weights: Tensor, query: Tensor, key: Tensor, table: tuple[Tensor, ...]) -> None:
        """Take ``heads`` with weights [h, S, T], query [h, S, d] and key [T, d] before rotation, and its table.

        With r = u turn, these are sums of w times u^2, u r, r^2, u conj(r) and |u|^2. Each is a product of a query's
        and of a key's numbers, so that the weights meet those of the keys first.
        """
        if not table:
            return
        turn = torch.complex(*table)
        queries, keys = (_products(_pairs(self._source, part), turn) for part in (query, key))
        flat = torch.view_as_real(keys).movedim(0, 1).flatten(1)
        met = torch.view_as_complex((weights @ flat).unflatten(-1, (len(keys), -1, 2)))
        self._sums[heads] += (queries.movedim(0, 2) * met.conj()).sum(1).to(torch.complex128)

    def fitted(self) -> tuple[Tensor, Tensor]:
        """c [H, pairs, 2], and the part of the energy of Re(r) that Re(u c) misses, [H, pairs]; both float64."""
        size = self._sums[:, 4].real
        uu, ur, rr, back, seen = (self._sums / size.clamp_min(TINY)[:, None]).unbind(1)
        real, imaginary, mixed = (seen.real + uu.real) / 2, (seen.real - uu.real) / 2, uu.imag / 2
        along, across = (ur + back).real / 2, (ur + back).imag / 2
        a, b = real + RIDGE, imaginary + RIDGE
        x, y = along + RIDGE * back.real, across + RIDGE * back.imag
        determinant = a * b - mixed * mixed
        c = torch.complex(b * x - mixed * y, mixed * x - a * y) / determinant
        energy = (self._source.gain**2 * seen.real + rr.real) / 2
        explained = 2 * (c.real * along - c.imag * across)
        missed = energy - explained + real * c.real**2 - 2 * mixed * c.real * c.imag + imaginary * c.imag**2
        return torch.view_as_real(c), (missed / energy.clamp_min(TINY)).clamp(0, 1)


def _pairs(source: Source, heads: Tensor) -> Tensor:
    """The rotary pairs of heads [.., d] as complex numbers [.., pairs]."""
    real, imaginary = pair_rows(source)
    return torch.complex(heads[..., real], heads[..., imaginary])


def _products(numbers: Tensor, turn: Tensor) -> Tensor:
    """Of numbers [.., T, pairs] what ``Turns.add`` multiplies and sums, [5, .., T, pairs]."""
    turned = numbers * turn
    return torch.stack(
        (numbers * numbers, numbers * turned, turned * turned, numbers * turned.conj(), numbers * numbers.conj())
    )
