"""Attention to cached keys and values: one token of SmolLM2-135M and of a Llama-3-8B, and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.kernels.decoding import Tile, dequantized
from benchmarks.kernels import Case
from benchmarks.kernels.latent_decode import cache

# Heads, key heads, elements of each.
MODELS = {"SmolLM2": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}


def cases(device: torch.device | str) -> Iterator[Case]:
    for bits in (16, 8, 4):
        yield case("SmolLM2", 1, 4096, bits, device)
        for batch, keys in ((1, 4096), (1, 65536), (32, 8192)):
            yield case("Llama-3-8B", batch, keys, bits, device)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    for bits in (16, 8, 4):
        yield case("SmolLM2", 1, 1024, bits, device)


def case(model: str, batch: int, keys: int, bits: int, device: torch.device | str) -> Case:
    heads, groups, size = MODELS[model]
    query = torch.randn(batch, 1, heads, size, dtype=torch.bfloat16, device=device)
    caches = [cache((batch, groups, keys), size, bits, device) for _ in range(2)]
    inputs = (query, *caches, size**-0.5, None, None, None, None, None, bits)
    return Case(f"{model} {batch} x {keys}, {bits} bits", inputs, 4.0 * batch * heads * keys * size, peers)


def peers(query: Tensor, keys: Tensor, values: Tensor, scale: float, *rest: Any) -> dict[str, Callable[[], Any]]:
    """Torch's attention, to the cache as it is, and to the same values in bfloat16."""
    bits, size = rest[-1], query.shape[-1]
    whole = [dequantized(cache, size, bits).to(query.dtype) for cache in (keys, values)]

    def attention(keys: Tensor, values: Tensor) -> Tensor:
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, scale=scale, enable_gqa=True)
        return mixed.transpose(1, 2)

    def unpacked() -> Tensor:
        return attention(*(dequantized(cache, size, bits).to(query.dtype) for cache in (keys, values)))

    found = {"torch, bfloat16 cache": lambda: attention(*whole)}
    return found if bits == 16 else found | {"torch, unpacked first": unpacked}


def candidates(query: Tensor, *rest: Any) -> list[Tile]:
    """Tiles that may be the best."""
    return [Tile(16, *sizes) for sizes in product((32, 64, 128), (4, 8), (2, 3, 4), (2, 4))]
