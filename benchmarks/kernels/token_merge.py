"""Merging of tokens: ViT-L/16 at 384 pixels and DeiT-S."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from backends.kernels.token_match import reference as match
from backends.kernels.token_merge import reference
from benchmarks.kernels import Case

# Batch, tokens, elements of a token, tokens that remain.
MODELS = {
    "DeiT-S": (64, 197, 384, 184),
    "ViT-L/16 at 384": (1, 577, 1024, 554),
    "ViT-L/16 at 384, 32": (32, 577, 1024, 554),
}
SMALL = {"ViT-S/16": (1, 197, 384, 184)}


def cases(device: torch.device | str) -> Iterator[Case]:
    yield from _made(MODELS, device)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    yield from _made(SMALL, device)


def _made(models: dict[str, tuple[int, ...]], device: torch.device | str) -> Iterator[Case]:
    for name, (batch, tokens, size, keep) in models.items():
        x = torch.randn(batch, tokens, size, dtype=torch.bfloat16, device=device)
        weight = torch.ones(batch, tokens, dtype=torch.float32, device=device)
        yield Case(name, (x, weight, *match(x, keep, 1, 0)), 2 * x.numel(), peers)


def peers(x: Tensor, weight: Tensor, index: Tensor, rest: Tensor, into: Tensor) -> dict[str, Callable[[], Any]]:
    """Operations of torch, with atomic additions."""
    return {"torch": lambda: reference(x, weight, index, rest, into)}
