"""Maps of low rank: the projections up and down of an MLP, of SmolLM2-135M and of Llama-3-8B, at several ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backends.kernels.low_rank_linear import Tile
from benchmarks.kernels import Case

# K, N, ranks and numbers of tokens.
SIZES = (
    (576, 1536, (64, 256), (1, 16)),
    (1536, 576, (64,), (1, 16)),
    (4096, 14336, (64, 256, 1024), (1, 16)),
    (4096, 14336, (256,), (4,)),
    (14336, 4096, (512,), (1, 16)),
)


def cases(device: torch.device | str) -> Iterator[Case]:
    for k, n, ranks, several in SIZES:
        for r, tokens in product(ranks, several):
            yield _case(tokens, k, r, n, device)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    for sizes in ((1, 576, 64, 1536), (16, 576, 64, 1536), (1, 1024, 320, 2048)):
        yield _case(*sizes, device)


def _case(tokens: int, k: int, r: int, n: int, device: torch.device | str) -> Case:
    x = torch.randn(tokens, k, dtype=torch.bfloat16, device=device)
    down = torch.randn(r, k, dtype=torch.bfloat16, device=device) / k**0.5
    up = torch.randn(n, r, dtype=torch.bfloat16, device=device) / r**0.5
    return Case(f"{tokens} x {k} > {r} > {n}", (x, down, up, None), 2 * tokens * r * (k + n), peers)


def peers(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> dict[str, Callable[[], Any]]:
    """torch's two products, and its one product with the matrix that the factors make."""
    dense = up @ down
    return {
        "torch": lambda: functional.linear(functional.linear(x, down), up, bias),
        "torch, dense": lambda: functional.linear(x, dense, bias),
    }


def candidates(x: Tensor, down: Tensor, up: Tensor, bias: Tensor | None) -> list[Tile]:
    """Each design, with what its programs share and how many there are."""
    several, r = x.shape[0] > 1, down.shape[0]
    stages = (3,) if several else (1, 3)
    blocks = ((8, 256), (16, 128), (16, 256)) if several else ((2, 2048), (4, 1024), (8, 512))
    found = []
    for (rows, depth), width in product(blocks, (64, 128)):
        found.append(Tile("launches", rows, depth, 16, width, 4, 4))
        found += [Tile("grid", rows, depth, 64, width, 2, 4, count, ahead=2048) for count in stages]
    for rows, depth in blocks:
        found.append(Tile("grid", rows, depth, 128, 64, 1, 8, ahead=4096))
    found.append(Tile("grid", *blocks[1], 64, 64, 2, 4))
    for rows, programs in product((16, 32, 64), (1, 2)):
        if rows <= max(16, r) <= 16 * rows:
            found.append(Tile("slices", rows, (8192 if several else 4096) // rows, 32, 0, programs, 8))
    return found
