"""Attention to latents: one token of DeepSeek-V2-Lite, DeepSeek-V3 and SmolLM2-135M with latents, and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backends.kernels.decoding import GROUP, Tile, dequantized, row_bytes
from benchmarks.kernels import Case

# Heads, rank, rotary size.
MODELS = {"V2-Lite": (16, 512, 64), "V3": (128, 512, 64), "SmolLM2": (9, 128, 32)}
PAGE = 64


def cases(device: torch.device | str) -> Iterator[Case]:
    for model, batch, keys in (
        ("SmolLM2", 1, 4096),
        ("V2-Lite", 1, 1024),
        ("V2-Lite", 1, 65536),
        ("V2-Lite", 32, 8192),
        ("V3", 1, 16384),
        ("V3", 64, 4096),
    ):
        yield case(model, batch, keys, 16, device)
    for bits in (8, 4):
        yield case("V2-Lite", 1, 16384, bits, device)
        yield case("V2-Lite", 32, 8192, bits, device)
    yield paged("V2-Lite", 32, 8192, device)


def small(device: torch.device | str) -> Iterator[Case]:
    """Sizes for counting."""
    for bits in (16, 4):
        yield case("V2-Lite", 1, 512, bits, device)
    yield paged("V2-Lite", 2, 256, device)


def case(model: str, batch: int, keys: int, bits: int, device: torch.device | str) -> Case:
    heads, rank, rotary = MODELS[model]
    caches = (cache((batch, keys), size, bits, device) for size in (rank, rotary))
    inputs = (*_queries(batch, heads, rank, rotary, device), *caches, 0.1, None, None, None, None, None, bits)
    return Case(f"{model} {batch} x {keys}, {bits} bits", inputs, _flops(inputs, keys), peers)


def paged(model: str, batch: int, keys: int, device: torch.device | str) -> Case:
    """Pages in an order without pattern."""
    heads, rank, rotary = MODELS[model]
    blocks = keys // PAGE
    pages = cache((batch * blocks, PAGE), rank + rotary, 16, device)
    table = torch.randperm(batch * blocks, device=device, dtype=torch.int32).view(batch, blocks)
    lengths = torch.full((batch,), keys, dtype=torch.int32, device=device)
    queries = _queries(batch, heads, rank, rotary, device)
    inputs = (*queries, pages[..., :rank], pages[..., rank:], 0.1, None, lengths, table)
    return Case(f"{model} {batch} x {keys}, pages", inputs, _flops(inputs, keys))


def _queries(batch: int, heads: int, rank: int, rotary: int, device: torch.device | str) -> list[Tensor]:
    return [torch.randn(batch, 1, heads, size, dtype=torch.bfloat16, device=device) for size in (rank, rotary)]


def cache(shape: tuple[int, ...], size: int, bits: int, device: torch.device | str) -> Tensor:
    """Rows [*shape, size] bfloat16, or bytes of codes of 8 or 4 bits; of about standard deviation 1."""
    if bits == 16:
        return torch.randn(*shape, size, dtype=torch.bfloat16, device=device)
    rows = torch.randint(0, 256, (*shape, row_bytes(size, bits)), dtype=torch.uint8, device=device)
    scales = 2 * -(-size // GROUP)
    rows[..., -scales::2], rows[..., 1 - scales :: 2] = 0x80, 0x3C if bits == 8 else 0x3E  # 2**-6, 2**-2
    return rows


def _flops(inputs: tuple[Any, ...], keys: int) -> float:
    batch, tokens, heads, rank = inputs[0].shape
    return 2.0 * batch * tokens * heads * keys * (2 * rank + inputs[1].shape[-1])


def peers(q_latent: Tensor, q_rotary: Tensor, latents: Tensor, rotary: Tensor, *rest: Any) -> dict[str, Callable]:
    """Torch's ways, with rows of codes made floats first: two products and a softmax, and attention to shared keys."""
    scale, bits = rest[0], rest[-1]

    def caches() -> tuple[Tensor, Tensor]:
        if bits == 16:
            return latents, rotary
        sizes = (q_latent.shape[-1], q_rotary.shape[-1])
        return tuple(
            dequantized(rows, size, bits).to(q_latent.dtype)
            for rows, size in zip((latents, rotary), sizes, strict=True)
        )

    def products() -> Tensor:
        values, keys = caches()
        scores = q_latent[:, 0] @ values.transpose(1, 2) + q_rotary[:, 0] @ keys.transpose(1, 2)
        return ((scores.float() * scale).softmax(-1).to(values.dtype) @ values).unsqueeze(1)

    def attention() -> Tensor:
        values, keys = caches()
        query = torch.cat((q_latent, q_rotary), -1).transpose(1, 2)
        key = torch.cat((values, keys), -1).unsqueeze(1)
        mixed = F.scaled_dot_product_attention(query, key, values.unsqueeze(1), scale=scale, enable_gqa=True)
        return mixed.transpose(1, 2)

    return {"torch products": products, "torch attention": attention}


def candidates(q_latent: Tensor, *rest: Any) -> list[Tile]:
    """Tiles that may be the best: of 16 queries a program, or of 32 and 64 where there are so many."""
    rows = q_latent.shape[1] * q_latent.shape[2]
    found = [Tile(16, *rest) for rest in product((16, 32, 64), (4, 8), (2, 3, 4), (1, 2)) if rest[0] * rest[2] <= 128]
    if rows > 16:
        found += [Tile(32, *rest) for rest in product((32, 64), (4, 8), (2, 3), (1, 2))]
    if rows > 32:
        found += [Tile(64, *rest) for rest in product((32, 64), (4, 8), (2, 3), (1,))]
    return found
