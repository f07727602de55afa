"""Products of vectors with themselves."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(rows: Tensor) -> Tensor:
    """X^T X of X [vectors, width], in its dtype: numpy has BLAS compute one half of it, and torch both."""
    values = rows.numpy()
    return torch.from_numpy(values.T @ values)
