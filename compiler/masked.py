"""Matrices of which only some elements remain: which of each few, and what values they should have."""

from __future__ import annotations

import torch
from torch import Tensor

FITTING = 8  # steps of conjugate gradients; the first few gain most


def of_each(scores: Tensor, kept: int, of: int) -> Tensor:
    """Bool [.., columns]: the ``kept`` largest of each ``of`` consecutive scores of a row."""
    grouped = scores.unflatten(-1, (-1, of))
    order = grouped.argsort(stable=True, descending=True)[..., :kept]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, order, True).flatten(-2)


def fitted(weight: Tensor, second: Tensor, kept: Tensor, sparse: Tensor) -> Tensor:
    """``sparse`` [rows, columns], what is ``kept`` of it moved towards the least error (W - S) H (W - S)^T of each row.

    H is ``second`` [columns, columns]. Conjugate gradients, no step of which can raise the error.
    """
    diagonal = second.diagonal()
    residual = (weight - sparse) @ second * kept
    scaled = residual / diagonal
    direction, energy = scaled, (residual * scaled).sum(-1, keepdim=True)
    for _ in range(FITTING):
        moved = direction @ second * kept
        step = _over(energy, (direction * moved).sum(-1, keepdim=True))
        sparse, residual = sparse + step * direction, residual - step * moved
        scaled = residual / diagonal
        before, energy = energy, (residual * scaled).sum(-1, keepdim=True)
        direction = scaled + _over(energy, before) * direction
    return sparse


def _over(above: Tensor, below: Tensor) -> Tensor:
    """The quotient; zero where a row is fitted already."""
    return torch.where(below > 0, above / below, 0.0)
