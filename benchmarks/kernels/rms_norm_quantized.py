"""RMSNorm to codes of 8 bits: one token and a batch of a model of width 4096."""

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
    return Case(f"{rows} x 4096", (x, residual, weight, EPSILON), 8 * x.numel(), peers)


def peers(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> dict[str, Callable[[], Any]]:
    """Operations of torch, one after another."""

    def rounded() -> tuple[Tensor, Tensor, Tensor]:
        total = x + residual
        y = torch.nn.functional.rms_norm(total, weight.shape, weight, epsilon).float()
        scale = (y.abs().amax(-1, keepdim=True) / 127.5).clamp(min=torch.finfo(torch.float32).tiny)
        return (y / scale).round().clamp(-128, 127).to(torch.int8), scale, total

    return {"torch": rounded}
