"""Weights that are looked up, of Llama-3-8B and SmolLM2-135M: scalars of 4 bits, vectors by one or two bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from backends.kernels.codebook_linear import Tile, reference
from benchmarks.kernels import Case

# N and K of a weight, codebooks added, entries, elements of a vector, and numbers of tokens.
CASES = (
    (1536, 576, 2, 256, 8, (1,)),
    (4096, 4096, 1, 16, 1, (1,)),
    (4096, 4096, 1, 256, 4, (1, 16)),
    (4096, 4096, 2, 256, 8, (1, 16, 256)),
    (4096, 4096, 1, 65536, 8, (1,)),
)
SMALL = ((384, 576, 1, 16, 1, (1,)), (768, 576, 2, 256, 8, (1, 16)))


def cases(device: torch.device | str) -> Iterator[Case]:
    yield from _made(CASES, device)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    yield from _made(SMALL, device)


def _made(table: tuple[Any, ...], device: torch.device | str) -> Iterator[Case]:
    for rows, width, books, entries, vector, several in table:
        kind = torch.uint8 if entries <= 256 else torch.int16
        indices = torch.randint(0, entries, (books, rows, width // vector), device=device).to(kind)
        codebooks = torch.randn(1, books, entries, vector, dtype=torch.bfloat16, device=device)
        scales = (torch.rand(rows, device=device) / width**0.5).to(torch.bfloat16)
        for tokens in several:
            x = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
            name = f"{tokens} x {width} > {rows}, {books} of {entries} x {vector}"
            yield Case(name, (x, indices, codebooks, scales), 2 * tokens * rows * width, peers)


def peers(x: Tensor, indices: Tensor, codebooks: Tensor, scales: Tensor) -> dict[str, Callable[[], Any]]:
    """A dense weight."""
    eye = torch.eye(x.shape[-1], device=x.device)
    weight = reference(eye, indices, codebooks, scales).to(x.dtype)
    return {"torch, bf16": lambda: x @ weight}


def candidates(x: Tensor, indices: Tensor, codebooks: Tensor, scales: Tensor) -> list[Tile]:
    """Blocks from narrow to wide."""
    block = next((size for size in (16, 32) if x.shape[0] <= size), 64)
    shapes = (
        (16, 128, 2),
        (16, 256, 4),
        (32, 64, 4),
        (32, 128, 4),
        (32, 256, 4),
        (64, 64, 4),
        (64, 128, 4),
        (64, 128, 8),
    )
    return [Tile(block, *shape, stages) for shape, stages in product(shapes, (1, 2, 3))]
