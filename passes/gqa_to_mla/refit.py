"""Fit the output projection to what the original attention yields from the same inputs: ridge least squares."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

RIDGE = 1e-2


def refitted(weight: Tensor, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The matrix [D, X] near ``weight`` that maps what enters it to what is wanted, float64.

    ``pairs`` are (entering [.., X], wanted [.., D]) without bias. A departure from ``weight`` costs ``RIDGE`` of the
    mean energy of what enters, so that directions which calibration hardly saw stay as they are.
    """
    width = weight.shape[1]
    gram = torch.zeros(width, width, dtype=torch.float64)
    cross = torch.zeros(weight.shape, dtype=torch.float64)
    for entering, wanted in pairs:
        rows = entering.reshape(-1, width)
        gram += (rows.T @ rows).double()
        cross += (wanted.reshape(-1, len(weight)).T @ rows).double()
    ridge = (RIDGE * float(gram.diagonal().mean()) or 1.0) * torch.eye(width, dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, (cross + weight.double() @ ridge).T).T
