"""Weights of which N of M are kept, of Llama-3-8B and SmolLM2-135M."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from backends.kernels.sparse_linear import Tile, bits_of, dense
from benchmarks.kernels import Case

# N and K of a weight, how many of how many are kept, and numbers of tokens.
CASES = (
    (1536, 576, 2, 4, (1,)),
    (4096, 4096, 2, 4, (1, 4, 16)),
    (14336, 4096, 2, 4, (1,)),
    (4096, 4096, 4, 8, (1,)),
    (4096, 4096, 2, 8, (1,)),
)
SMALL = ((512, 576, 2, 4, (1, 4)),)


def cases(device: torch.device | str) -> Iterator[Case]:
    yield from _made(CASES, device)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    yield from _made(SMALL, device)


def _made(table: tuple[Any, ...], device: torch.device | str) -> Iterator[Case]:
    for rows, width, count, period, several in table:
        groups, bits = width // period, bits_of(period)
        values = torch.randn(rows, groups * count, dtype=torch.bfloat16, device=device) / width**0.5
        places = torch.rand(rows, groups, period, device=device).topk(count, -1).indices.sort(-1).values
        octets = places.view(rows, -1, 8 // bits) << (torch.arange(8 // bits, device=device) * bits)
        positions = octets.sum(-1).to(torch.uint8).view(torch.int32)
        for tokens in several:
            x = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
            name = f"{tokens} x {width} > {rows}, {count} of {period}"
            yield Case(name, (x, values, positions, period), 2 * tokens * values.numel(), peers)


def peers(x: Tensor, values: Tensor, positions: Tensor, period: int) -> dict[str, Callable[[], Any]]:
    """A dense weight."""
    weight = dense(values, positions, period, x.shape[-1])
    return {"torch, dense": lambda: x @ weight.mT}


def candidates(x: Tensor, values: Tensor, positions: Tensor, period: int) -> list[Tile]:
    """Rows times columns that fill a few registers of each thread."""
    shapes = ((1, 1024, 4), (2, 256, 2), (2, 512, 4), (4, 256, 4), (4, 512, 4), (4, 1024, 8), (8, 256, 4), (8, 512, 8))
    found = [Tile(False, *shape, stages) for shape, stages in product(shapes, (1, 2, 3, 4))]
    return [*found, Tile(True, 4, 256, 4, 1), Tile(True, 2, 512, 4, 1), Tile(True, 8, 128, 4, 1)]
