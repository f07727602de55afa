"""RMSNorm with the residual addition: one token and a batch of a model of width 4096."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import Case

EPSILON = 1e-5


def cases(device: torch.device | str) -> Iterator[Case]:
    for rows in (1, 64, 8192):
        yield _case(rows, device)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    for rows in (1, 16):
        yield _case(rows, device)


def _case(rows: int, device: torch.device | str) -> Case:
    x, residual = (torch.randn(rows, 4096, dtype=torch.bfloat16, device=device) for _ in range(2))
    weight = torch.rand(4096, dtype=torch.bfloat16, device=device)
    return Case(f"{rows} x 4096", (x, residual, weight, EPSILON), 5 * x.numel(), peers)


def peers(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> dict[str, Callable[[], Any]]:
    """Two kernels of torch: the sum, and its fused norm."""
    return {"torch": lambda: torch.nn.functional.rms_norm(x + residual, weight.shape, weight, epsilon)}
