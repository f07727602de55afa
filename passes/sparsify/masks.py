"""Which elements of a matrix remain: those of the largest scores."""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.masked import of_each
from passes.sparsify.places import Part, Pattern


def largest(scores: Tensor, part: Part) -> Tensor:
    """Bool [rows, columns]: the largest of ``scores``, as many as ``part`` says, wherever they are."""
    if isinstance(part, Pattern):
        return of_each(scores, part.kept, part.of)
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[scores.flatten().argsort(stable=True, descending=True)[:part]] = True
    return kept.view_as(scores)


def largest_by_row(scores: Tensor, part: Part) -> Tensor:
    """The same, as many in every row; what does not divide goes to the rows with the largest score left."""
    if isinstance(part, Pattern):
        return of_each(scores, part.kept, part.of)
    each, more = divmod(part, len(scores))
    order = scores.argsort(stable=True, descending=True)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[:, :each], True)
    if more:
        column = order[:, each]
        rows = scores.gather(-1, column[:, None])[:, 0].argsort(stable=True, descending=True)[:more]
        kept[rows, column[rows]] = True
    return kept
