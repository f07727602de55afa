"""Attention of a few queries to a cache of keys and values that heads share, of full precision, 8 or 4 bits.

    result[t, h] = Σ_s softmax_s(scale · q[t, h] · key[g, s]) · value[g, s],   g = h · G // H

The T queries are the last of their sequence: each sees the keys up to its own. One program takes ``rows`` of the
T * H / G queries of a key head and a split of the keys. Bytes moved: keys and values once, as they are stored; a result
of float32 for each split.
Source: Ainslie et al., GQA, 2023 (arXiv 2305.13245); Dao et al., Flash-Decoding for long-context inference, 2023.
"""

# pyright: basic
from __future__ import annotations

import torch
import torch.nn.functional as F
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

WIDEST = 1024
# Bits of the cache, queries of a key head, bytes of a key or value on chip, each at most -> tile; the first that does.
TILES = {
    (4, 1 << 30, 256): Tile(16, 64, 4, 2, 4),
    (8, 1 << 30, 256): Tile(16, 32, 4, 2, 4),
    (8, 1 << 30, WIDEST): Tile(16, 32, 8, 2, 2),
    (16, 1 << 30, 256): Tile(16, 32, 4, 3, 2),
    (16, 1 << 30, WIDEST): Tile(16, 32, 4, 2, 2),
}


def reference(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bits: int = 16,
) -> Tensor:
    """The result [B, T, H, v] of ``query`` [B, T, H, d], in its dtype; what is rounded is only that.

    ``keys`` [B, G, S, d] and ``values`` [B, G, S, v] have the query's dtype, or are bytes uint8 of 8 or 4 ``bits``, as
    ``decoding`` says (v = d then). G divides H. ``lengths`` int32 [B]: keys of each sequence, of at
    most S; None: S. Of them a query sees those that ``mask`` bool [B or 1, 1, T or 1, S] does not forbid, and with a
    ``window`` no more than so many, its own included. ``softcap`` bends scores; ``sinks`` [H] are logits without a
    value. A query that sees nothing gets 0.
    """
    keys, values = dequantized(keys, query.shape[-1], bits), dequantized(values, query.shape[-1], bits)
    tokens = query.shape[1]
    query_heads = query.float().transpose(1, 2).unflatten(1, (keys.shape[1], -1))
    scores = (query_heads @ keys.float().unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * scale
    visible = seen(mask, lengths, window, tokens, torch.arange(keys.shape[2], device=keys.device))
    weights = weights_of(scores, visible, softcap, sinks).unflatten(1, (keys.shape[1], -1))
    mixed = (weights @ values.float().unsqueeze(2)).flatten(1, 2)
    return mixed.transpose(1, 2).to(query.dtype)


@jit_for_any("keys", "splits", "keys_batch", "keys_head", "values_batch", "values_head", "mask_batch", "mask_token")
def _cached_decode(
    query, cached_keys, cached_values, lengths, mask, sinks, sums, logs,
    keys, splits, window, scale, softcap,
    q_batch, q_token, q_head, keys_batch, keys_head, values_batch, values_head, mask_batch, mask_token,
    KEY: tl.constexpr, KEY_STRIDE: tl.constexpr, KEY_GROUPS: tl.constexpr, KEY_WIDTH: tl.constexpr,
    KEY_ALIGN: tl.constexpr, VALUE: tl.constexpr, VALUE_STRIDE: tl.constexpr, VALUE_GROUPS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, VALUE_ALIGN: tl.constexpr, BITS: tl.constexpr, LENGTHS: tl.constexpr,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr, HEADS: tl.constexpr,
    SHARE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    batch, group = tl.program_id(2) // (HEADS // SHARE), tl.program_id(2) % (HEADS // SHARE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < SHARE * TOKENS
    token, head = row // SHARE, group * SHARE + row % SHARE
    element = element_of(KEY, KEY_GROUPS, KEY_WIDTH, BITS)
    start = batch.to(tl.int64) * q_batch + token.to(tl.int64) * q_token + head * q_head
    chosen = real[:, None] & (element < KEY)[None, :]
    asked = tl.load(query + start[:, None] + element[None, :], mask=chosen, other=0.0)
    DTYPE: tl.constexpr = query.dtype.element_ty
    if WIDE:
        asked = asked.to(tl.float32)
    length, first, last = span(batch, split, lengths, keys, TOKENS, window, splits, LENGTHS, KEYS)
    own = length - TOKENS + token
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        sink = tl.load(sinks + head, mask=real, other=-float("inf")).to(tl.float32) * 1.4426950408889634
        top = tl.where(split == 0, sink, top)
        total = tl.where(top > -float("inf"), 1.0, 0.0)
    mixed = tl.zeros([ROWS, VALUE_GROUPS * VALUE_WIDTH], tl.float32)
    key_rows = cached_keys + tl.multiple_of(group.to(tl.int64) * keys_head, KEY_ALIGN)
    value_rows = cached_values + tl.multiple_of(group.to(tl.int64) * values_head, VALUE_ALIGN)
    for at in range(first, last, KEYS):
        place = at + tl.arange(0, KEYS)
        inside = place < last
        starts = row_starts(lengths, batch, at, place, inside, keys_batch, 0, KEY_STRIDE, KEY_ALIGN, 0, KEYS)
        key = rows_at(key_rows, starts, inside, DTYPE, KEY, KEY_GROUPS, KEY_WIDTH, BITS)
        starts = row_starts(lengths, batch, at, place, inside, values_batch, 0, VALUE_STRIDE, VALUE_ALIGN, 0, KEYS)
        value = rows_at(value_rows, starts, inside, DTYPE, VALUE, VALUE_GROUPS, VALUE_WIDTH, BITS)
        if WIDE:
            key, value = key.to(tl.float32), value.to(tl.float32)
        scores = tl.dot(asked, tl.trans(key), input_precision="ieee")
        visible = seen_keys(mask, batch, token, place, own, window, mask_batch, mask_token, inside, MASKED)
        scores = logarithms(scores, visible, scale, softcap, SOFTCAP)
        weights, shrunk, total, top = more_scores(scores, total, top)
        mixed = tl.dot(weights.to(value.dtype), value, mixed * shrunk[:, None], input_precision="ieee")
    total = tl.where(total > 0, total, 1.0)
    slot = (batch * splits + split).to(tl.int64) * (HEADS * TOKENS) + token * HEADS + head
    element = element_of(VALUE, VALUE_GROUPS, VALUE_WIDTH, BITS)
    mean = (mixed / total[:, None]).to(sums.dtype.element_ty)
    tl.store(sums + slot[:, None] * VALUE + element[None, :], mean, mask=real[:, None] & (element < VALUE)[None, :])
    if SPLIT:
        tl.store(logs + slot, top + tl.log2(total), mask=real)


def outside(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bits: int = 16,
) -> str | None:
    """Why the inputs are not for the kernel."""
    dtype, sizes = query.dtype, _sizes(query, values, bits)
    held = [n if bits == 16 else row_bytes(n, bits) for n in sizes]
    stored = dtype if bits == 16 else torch.uint8
    return first_reason(
        [
            (dtype in (torch.float32, torch.float16, torch.bfloat16), f"{dtype} is no dtype of activations"),
            (bits in (16, 8, 4), f"caches of {bits} bits are not known"),
            (keys.dtype == stored and values.dtype == stored, "caches of another dtype"),
            ([keys.shape[-1], values.shape[-1]] == held, f"rows of the caches are not of {held}"),
            (keys.stride(-1) == 1 and values.stride(-1) == 1, "elements of a row do not lie together"),
            (bytes_on_chip(query, max(sizes)) <= WIDEST, f"heads of {max(sizes)} elements do not fit on chip"),
        ]
    )


def plan(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bits: int = 16,
    tile: Tile | None = None,
) -> Plan:
    """One launch where a program takes all keys of its queries, or one of splits and one that combines them."""
    batch, tokens, heads, _ = query.shape
    groups, extent = keys.shape[1:3]
    share = heads // groups
    key_size, value_size = _sizes(query, values, bits)
    tile = tile or tile_of(TILES, bits, tokens * share, bytes_on_chip(query, max(key_size, value_size)))
    blocks = ceil_div(tokens * share, tile.rows)
    near = extent if window is None else min(extent, window + tokens - 1)
    splits = splits_of(batch * groups * blocks, near, tile, gpu_of(query).processors)
    result = query.new_empty(batch, tokens, heads, value_size)
    sums, logs = scratch(query, splits, tokens * heads, value_size) if splits > 1 else (result, result)
    keys, values = units(keys, bits), units(values, bits)
    masks, masked = mask_arguments(mask, keys)
    arguments = {
        **query_arguments("query", "q", query),
        "cached_keys": keys,
        "cached_values": values,
        "lengths": keys if lengths is None else lengths,
        "sinks": keys if sinks is None else sinks,
        "sums": sums,
        "logs": logs,
        "keys": extent,
        "splits": splits,
        "window": EVERYTHING if window is None else window,
        "scale": scale,
        "softcap": softcap or 1.0,
        "keys_batch": keys.stride(0),
        "keys_head": keys.stride(1),
        "values_batch": values.stride(0),
        "values_head": values.stride(1),
        **masks,
    }
    constants = {
        **layout("KEY", keys, key_size, bits),
        **layout("VALUE", values, value_size, bits),
        "BITS": bits,
        "LENGTHS": lengths is not None,
        "MASKED": masked,
        "SOFTCAP": softcap is not None,
        "SINKS": sinks is not None,
        "SPLIT": splits > 1,
        "HEADS": heads,
        "SHARE": share,
        "TOKENS": tokens,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "WIDE": INTERPRETED,
    }
    launch = Launch(_cached_decode, (blocks, splits, batch * groups), arguments, constants, tile.warps, tile.stages)
    return Plan(result, [launch, combination(sums, logs, result)] if splits > 1 else [launch])


def _sizes(query: Tensor, values: Tensor, bits: int) -> list[int]:
    """Elements of a key and of a value."""
    return [query.shape[-1], values.shape[-1] if bits == 16 else query.shape[-1]]


def cached_decode(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bits: int = 16,
) -> Tensor:
    """The result [B, T, H, v], as ``reference`` says; on CPUs by torch's attention where that has what is asked."""
    if softcap is not None or sinks is not None:
        return reference(query, keys, values, scale, mask, lengths, window, softcap, sinks, bits)
    tokens, extent = query.shape[1], keys.shape[2]
    keys = dequantized(keys, query.shape[-1], bits).to(query.dtype)
    values = dequantized(values, query.shape[-1], bits).to(query.dtype)
    allowed = None
    if tokens > 1 or not (mask is None and lengths is None and window is None):
        allowed = seen(mask, lengths, window, tokens, torch.arange(extent, device=keys.device))
    mixed = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, allowed, scale=scale, enable_gqa=True)
    return mixed.transpose(1, 2).contiguous()


def _shaped(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bits: int = 16,
) -> Tensor:
    return query.new_empty(*query.shape[:-1], _sizes(query, values, bits)[1])


cached_decode = operation(cached_decode, reference, plan, outside, _shaped)
