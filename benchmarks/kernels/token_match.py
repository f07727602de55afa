"""Matching of tokens: ViT-L/16 at 384 pixels and DeiT-S, the keys' mean over heads as metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from backends.kernels.token_match import Tile, reference
from benchmarks.kernels import Case

# Batch, tokens, elements of a metric, tokens that remain.
MODELS = {"DeiT-S": (64, 197, 64, 184), "ViT-L/16 at 384": (1, 577, 64, 554), "ViT-L/16 at 384, 32": (32, 577, 64, 554)}

SMALL = {"ViT-S/16": (1, 197, 64, 184)}


def cases(device: torch.device | str) -> Iterator[Case]:
    yield from _made(MODELS, device)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    yield from _made(SMALL, device)


def _made(models: dict[str, tuple[int, ...]], device: torch.device | str) -> Iterator[Case]:
    for name, (batch, tokens, size, keep) in models.items():
        metric = torch.randn(batch, tokens, size, dtype=torch.bfloat16, device=device)
        yield Case(name, (metric, keep, 1, 0), batch * tokens**2 * size / 2, peers)


def peers(metric: Tensor, keep: int, prefix: int, suffix: int) -> dict[str, Callable[[], Any]]:
    """Operations of torch, with the matrix of all cosines."""
    return {"torch": lambda: reference(metric, keep, prefix, suffix)}


def candidates(metric: Tensor, *rest: Any) -> list[Tile]:
    """Tiles that may be the best."""
    return [Tile(*sizes) for sizes in product((16, 32, 64), (32, 64, 128), (64,), (2, 4), (2, 3))]
