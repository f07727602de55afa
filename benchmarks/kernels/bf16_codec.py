"""Weights stored as bfloat16 in about 11 bits: a projection of SmolLM2-135M, one of Llama-3-8B, and its embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from backends.kernels.bf16_codec import BLOCK, WORD, Tile, encode
from benchmarks.kernels import Case

# Bytes of further codes that a block of normal weights has, where there is no data to encode.
ESCAPES = 176


def cases(device: torch.device | str) -> Iterator[Case]:
    for rows, columns in ((1536, 576), (4096, 4096), (14336, 4096)):
        yield Case(f"{rows} x {columns}", _stored(rows, columns, device), 0.0, peers)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    yield Case("192 x 576", _stored(192, 576, device), 0.0)


def _stored(rows: int, columns: int, device: torch.device | str) -> tuple[Tensor, ...]:
    if torch.device(device).type == "meta":
        blocks = rows * columns // BLOCK
        shapes = {torch.uint8: (rows, columns), torch.int32: (rows * columns // WORD,)}
        mantissas, first = (torch.empty(shape, dtype=dtype, device=device) for dtype, shape in shapes.items())
        escapes = torch.empty(blocks * ESCAPES, dtype=torch.uint8, device=device)
        starts = torch.empty(blocks, dtype=torch.int32, device=device)
        return mantissas, first, escapes, starts, torch.empty(21, dtype=torch.uint8, device=device)
    return encode((torch.randn(rows, columns, device=device) / columns**0.5).bfloat16())


def peers(
    mantissas: Tensor, first: Tensor, escapes: Tensor, starts: Tensor, table: Tensor
) -> dict[str, Callable[[], Any]]:
    """A copy of the bare weights: what reading them uncompressed takes."""
    weight = torch.empty_like(mantissas, dtype=torch.bfloat16)
    return {"copy of bfloat16": lambda: weight.clone()}


def candidates(*inputs: Tensor) -> list[Tile]:
    return [Tile(warps) for warps in (1, 2, 4, 8)]
