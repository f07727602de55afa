"""Multi-head latent attention of a few queries to a cache of latents, without keys or values of heads.

    result[t, h] = Σ_s softmax_s(scale · (q_latent[t, h] · latent[s] + q_rotary[t, h] · rotary_key[s])) · latent[s]

The key rows of the up-projection are in the query already, and the caller multiplies the value rows into the result.
The T queries are the last of their sequence: each sees the keys up to its own. One program takes ``rows`` of the T * H
queries and a split of the keys; a latent it loads is key and value at once. Bytes moved: latents and rotary keys once
for every ``rows`` queries, from memory once; a result of float32 for each split.
Sources: DeepSeek-AI, DeepSeek-V2, 2024 (arXiv 2405.04434), section 2.1; Dao et al., Flash-Decoding, 2023.
"""

# pyright: basic
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .decoding import (
    EVERYTHING,
    Tile,
    bytes_on_chip,
    combination,
    dequantized,
    element_of,
    layout,
    logarithms,
    mask_arguments,
    more_scores,
    paged,
    query_arguments,
    row_bytes,
    row_starts,
    rows_at,
    scratch,
    seen,
    seen_keys,
    span,
    splits_of,
    tile_of,
    units,
    weights_of,
)
from .launch import INTERPRETED, Launch, Plan, ceil_div, first_reason, gpu_of, jit_for_any, operation, tl

WIDEST = 2048
# Bits of the cache, queries of a sequence and bytes of a latent on chip, each at most -> tile; the first that does.
TILES = {
    (4, 1 << 30, 1024): Tile(16, 32, 8, 2, 1),
    (8, 1 << 30, 1024): Tile(16, 32, 4, 3, 2),
    (8, 1 << 30, WIDEST): Tile(16, 16, 8, 2, 1),
    (16, 16, 512): Tile(16, 32, 4, 3, 2),
    (16, 1 << 30, 1024): Tile(16, 32, 4, 2, 2),
    (16, 1 << 30, WIDEST): Tile(16, 16, 8, 2, 1),
}


def reference(
    q_latent: Tensor,
    q_rotary: Tensor | None,
    latents: Tensor,
    rotary_keys: Tensor | None,
    scale: float,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    table: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bits: int = 16,
) -> Tensor:
    """The result [B, T, H, r] of queries [B, T, H, r] and [B, T, H, R] in their dtype; what is rounded is only that.

    ``latents`` [B, S, r] and ``rotary_keys`` [B, S, R] (None with ``q_rotary``: R is 0) have the queries' dtype, or are
    bytes uint8 of 8 or 4 ``bits``, as ``decoding`` says. With a ``table`` int32 [B, blocks] they are pages
    [P, page, ...], and key s of a sequence lies in page ``table[b, s // page]``. ``lengths`` int32 [B]: keys of each
    sequence, of at most S; None: S. Of them a query sees those that ``mask`` bool [B or 1, 1, T or 1, S] does not
    forbid, and with a ``window`` no more than so many, its own included. A query that sees nothing gets 0.
    """
    inputs = (q_latent, q_rotary, latents, rotary_keys, scale, mask, lengths, table, window, softcap, bits)
    return _attended(torch.float32, *inputs)


def _attended(
    dtype, q_latent, q_rotary, latents, rotary_keys, scale, mask, lengths, table, window, softcap, bits
) -> Tensor:
    """The result, by products of ``dtype``."""
    tokens, heads, rank = q_latent.shape[1:]
    if table is not None:
        latents, rotary_keys = paged(latents, table), None if rotary_keys is None else paged(rotary_keys, table)
    latents = dequantized(latents, rank, bits).to(dtype)
    scores = q_latent.to(dtype).flatten(1, 2) @ latents.transpose(1, 2)
    if q_rotary is not None and rotary_keys is not None:
        keys = dequantized(rotary_keys, q_rotary.shape[-1], bits).to(dtype)
        scores = scores + q_rotary.to(dtype).flatten(1, 2) @ keys.transpose(1, 2)
    scores = scores.float().unflatten(1, (tokens, heads)).transpose(1, 2) * scale
    visible = seen(mask, lengths, window, tokens, torch.arange(latents.shape[1], device=latents.device))
    weights = weights_of(scores, visible, softcap).to(dtype).transpose(1, 2).flatten(1, 2)
    return (weights @ latents).unflatten(1, (tokens, heads)).to(q_latent.dtype)


@jit_for_any("keys", "splits", "latents_batch", "rotary_batch", "table_batch", "mask_batch", "mask_token")
def _latent_decode(
    q_latent, q_rotary, latents, rotary_keys, table, lengths, mask, sums, logs,
    keys, splits, window, scale, softcap,
    q_batch, q_token, q_head, turned_batch, turned_token, turned_head,
    latents_batch, rotary_batch, table_batch, mask_batch, mask_token,
    RANK: tl.constexpr, RANK_STRIDE: tl.constexpr, RANK_GROUPS: tl.constexpr, RANK_WIDTH: tl.constexpr,
    RANK_ALIGN: tl.constexpr, ROTARY: tl.constexpr, ROTARY_STRIDE: tl.constexpr, ROTARY_GROUPS: tl.constexpr,
    ROTARY_WIDTH: tl.constexpr, ROTARY_ALIGN: tl.constexpr, BITS: tl.constexpr, PAGE: tl.constexpr,
    LENGTHS: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    split, batch = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < HEADS * TOKENS
    token, head = row // HEADS, row % HEADS
    element = element_of(RANK, RANK_GROUPS, RANK_WIDTH, BITS)
    stored = real[:, None] & (element < RANK)[None, :]
    DTYPE: tl.constexpr = q_latent.dtype.element_ty
    start = batch.to(tl.int64) * q_batch + token.to(tl.int64) * q_token + head * q_head
    query = tl.load(q_latent + start[:, None] + element[None, :], mask=stored, other=0.0)
    if ROTARY:
        start = batch.to(tl.int64) * turned_batch + token.to(tl.int64) * turned_token + head * turned_head
        place = element_of(ROTARY, ROTARY_GROUPS, ROTARY_WIDTH, BITS)
        chosen = real[:, None] & (place < ROTARY)[None, :]
        turned = tl.load(q_rotary + start[:, None] + place[None, :], mask=chosen, other=0.0)
    if WIDE:
        query = query.to(tl.float32)
    if WIDE and ROTARY:
        turned = turned.to(tl.float32)
    length, first, last = span(batch, split, lengths, keys, TOKENS, window, splits, LENGTHS, KEYS)
    own = length - TOKENS + token
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, RANK_GROUPS * RANK_WIDTH], tl.float32)
    for at in range(first, last, KEYS):
        key = at + tl.arange(0, KEYS)
        inside = key < last
        starts = row_starts(
            table, batch, at, key, inside, latents_batch, table_batch, RANK_STRIDE, RANK_ALIGN, PAGE, KEYS
        )
        latent = rows_at(latents, starts, inside, DTYPE, RANK, RANK_GROUPS, RANK_WIDTH, BITS)
        if WIDE:
            latent = latent.to(tl.float32)
        scores = tl.dot(query, tl.trans(latent), input_precision="ieee")
        if ROTARY:
            starts = row_starts(
                table, batch, at, key, inside, rotary_batch, table_batch, ROTARY_STRIDE, ROTARY_ALIGN, PAGE, KEYS
            )
            rotary = rows_at(rotary_keys, starts, inside, DTYPE, ROTARY, ROTARY_GROUPS, ROTARY_WIDTH, BITS)
            if WIDE:
                rotary = rotary.to(tl.float32)
            scores = tl.dot(turned, tl.trans(rotary), scores, input_precision="ieee")
        visible = seen_keys(mask, batch, token, key, own, window, mask_batch, mask_token, inside, MASKED)
        scores = logarithms(scores, visible, scale, softcap, SOFTCAP)
        weights, shrunk, total, top = more_scores(scores, total, top)
        mixed = tl.dot(weights.to(latent.dtype), latent, mixed * shrunk[:, None], input_precision="ieee")
    total = tl.where(total > 0, total, 1.0)
    mixed = mixed / total[:, None]
    slot = (batch * splits + split).to(tl.int64) * (HEADS * TOKENS) + row
    tl.store(sums + slot[:, None] * RANK + element[None, :], mixed.to(sums.dtype.element_ty), mask=stored)
    if SPLIT:
        tl.store(logs + slot, top + tl.log2(total), mask=real)


def outside(
    q_latent: Tensor,
    q_rotary: Tensor | None,
    latents: Tensor,
    rotary_keys: Tensor | None,
    scale: float,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    table: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bits: int = 16,
) -> str | None:
    """Why the inputs are not for the kernel."""
    dtype, rank = q_latent.dtype, q_latent.shape[-1]
    rotated = 0 if q_rotary is None else q_rotary.shape[-1]
    caches = [latents] if rotary_keys is None else [latents, rotary_keys]
    sizes = [size if bits == 16 else row_bytes(size, bits) for size in (rank, rotated) if size]
    return first_reason(
        [
            (dtype in (torch.float32, torch.float16, torch.bfloat16), f"{dtype} is no dtype of activations"),
            (bits in (16, 8, 4), f"caches of {bits} bits are not known"),
            (all(cache.dtype == (dtype if bits == 16 else torch.uint8) for cache in caches), "caches of another dtype"),
            ([cache.shape[-1] for cache in caches] == sizes, f"rows of the caches are not of {sizes}"),
            (all(cache.stride(-1) == 1 for cache in caches), "elements of a latent do not lie together"),
            (table is None or lengths is not None, "pages without lengths of the sequences"),
            (
                max(bytes_on_chip(q_latent, rank), 4 * bytes_on_chip(q_latent, rotated)) <= WIDEST,
                f"latents of {rank} and {rotated} elements do not fit on chip",
            ),
        ]
    )


def plan(
    q_latent: Tensor,
    q_rotary: Tensor | None,
    latents: Tensor,
    rotary_keys: Tensor | None,
    scale: float,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    table: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bits: int = 16,
    tile: Tile | None = None,
) -> Plan:
    """One launch where a program takes all keys of its queries, or one of splits and one that combines them."""
    batch, tokens, heads, rank = q_latent.shape
    rows = tokens * heads
    tile = tile or tile_of(TILES, bits, rows, bytes_on_chip(q_latent, rank))
    keys = latents.shape[1] if table is None else table.shape[1] * latents.shape[1]
    blocks = ceil_div(rows, tile.rows)
    extent = keys if window is None else min(keys, window + tokens - 1)
    splits = splits_of(batch * blocks, extent, tile, gpu_of(q_latent).processors)
    result = torch.empty_like(q_latent, memory_format=torch.contiguous_format)
    sums, logs = scratch(q_latent, splits, rows, rank) if splits > 1 else (result, result)
    latents = units(latents, bits)
    rotary = latents if rotary_keys is None else units(rotary_keys, bits)
    masks, masked = mask_arguments(mask, latents)
    arguments = {
        **query_arguments("q_latent", "q", q_latent),
        **query_arguments("q_rotary", "turned", q_latent if q_rotary is None else q_rotary),
        "latents": latents,
        "rotary_keys": rotary,
        "table": latents if table is None else table,
        "lengths": latents if lengths is None else lengths,
        "sums": sums,
        "logs": logs,
        "keys": keys,
        "splits": splits,
        "window": EVERYTHING if window is None else window,
        "scale": scale,
        "softcap": softcap or 1.0,
        "latents_batch": latents.stride(0),
        "rotary_batch": rotary.stride(0),
        "table_batch": 0 if table is None else table.stride(0),
        **masks,
    }
    constants = {
        **layout("RANK", latents, rank, bits),
        **layout("ROTARY", rotary, 0 if q_rotary is None else q_rotary.shape[-1], bits),
        "BITS": bits,
        "PAGE": 0 if table is None else latents.shape[1],
        "LENGTHS": lengths is not None,
        "MASKED": masked,
        "SOFTCAP": softcap is not None,
        "SPLIT": splits > 1,
        "HEADS": heads,
        "TOKENS": tokens,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "WIDE": INTERPRETED,
    }
    launch = Launch(_latent_decode, (blocks, splits, batch), arguments, constants, tile.warps, tile.stages)
    return Plan(result, [launch, combination(sums, logs, result)] if splits > 1 else [launch])


def latent_decode(
    q_latent: Tensor,
    q_rotary: Tensor | None,
    latents: Tensor,
    rotary_keys: Tensor | None,
    scale: float,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    table: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    bits: int = 16,
) -> Tensor:
    """The result [B, T, H, r], as ``reference`` says; on CPUs by products of the queries' dtype."""
    inputs = (q_latent, q_rotary, latents, rotary_keys, scale, mask, lengths, table, window, softcap, bits)
    return _attended(q_latent.dtype, *inputs)


def _shaped(q_latent: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty_like(q_latent, memory_format=torch.contiguous_format)


latent_decode = operation(latent_decode, latent_decode, plan, outside, _shaped)
