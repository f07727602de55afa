"""The gated product of packed MLPs of SmolLM2-135M and of Llama-3-8B."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backends.kernels.packed_linear import Tile
from backends.kernels.packed_weight import dense
from benchmarks.kernels import Case
from benchmarks.kernels.packed_linear import random_words, tinygemm

# N, K and G of a weight, and numbers of tokens.
CASES = ((1536, 576, 9, (1, 16)), (14336, 4096, 32, (1, 4, 16, 512)))

SMALL = ((384, 576, 9, (1, 16)),)


def cases(device: torch.device | str) -> Iterator[Case]:
    yield from _made(CASES, device)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    yield from _made(SMALL, device)


def _made(table: tuple[Any, ...], device: torch.device | str) -> Iterator[Case]:
    for rows, width, groups, several in table:
        gate, up = ((random_words(rows, width // 8, device), _scales(rows, groups, width, device)) for _ in range(2))
        for tokens in several:
            x = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
            inputs = (x, *gate, None, *up, None, 4)
            yield Case(f"{tokens} x {width} > {rows}", inputs, 4 * tokens * rows * width, peers)


def _scales(rows: int, groups: int, width: int, device: torch.device | str) -> Tensor:
    return (torch.rand(rows, groups, device=device) / width**0.5).to(torch.bfloat16)


def peers(
    x: Tensor,
    gate_words: Tensor,
    gate_scales: Tensor,
    gate_zeros: None,
    up_words: Tensor,
    up_scales: Tensor,
    up_zeros: None,
    bits: int,
) -> dict[str, Callable[[], Any]]:
    """Dense weights as one matrix, and ATen's kernel for each of the packed ones."""
    weights = ((gate_words, gate_scales), (up_words, up_scales))
    dense_pair = torch.cat([dense(*each, None, bits, x.shape[-1]) for each in weights]).to(x.dtype)

    def torch_bf16() -> Tensor:
        gate, up = (x @ dense_pair.mT).chunk(2, -1)
        return functional.silu(gate) * up

    found: dict[str, Callable[[], Any]] = {"torch, bf16": torch_bf16}
    if x.shape[-1] % 1024 == 0:
        gate_call, up_call = (tinygemm(x, *each) for each in weights)
        found["tinygemm"] = lambda: functional.silu(gate_call()) * up_call()
    return found


def candidates(x: Tensor, *weights: Any) -> list[Tile]:
    """Each design that suits the number of tokens."""
    shapes = (
        (16, 4, 2),
        (16, 4, 4),
        (32, 2, 2),
        (32, 2, 4),
        (32, 4, 4),
        (32, 4, 8),
        (64, 2, 4),
        (64, 4, 4),
        (64, 4, 8),
    )
    block = next((size for size in (16, 32, 64) if x.shape[0] <= size), 128)
    found = [Tile("matrix", block, *shape, stages) for shape, stages in product(shapes, (2, 3, 4))]
    return [*found, Tile("widened", 1, 16, 16, 4, 1)]
