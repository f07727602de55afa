"""What kernels of attention to a cache share: how its rows are read, what a query sees, and splits of the keys.

The keys are split among programs, as few queries alone would not keep a GPU busy. A program writes the mean of the
values that its keys take part in, and the logarithm of its sum of exponentials; ``_combine`` weighs the means by these.
Source: Dao et al., Flash-Decoding for long-context inference, 2023.

Rows of a cache hold elements of full precision, or the bytes that generated modules make of them: codes of 8 or 4 bits
in two's complement, the first of two in the low bits, then a bfloat16 scale for each group of at most 64 elements.
"""

# pyright: basic
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .launch import Launch, ceil_div, jit, jit_for_any, power_of_two, tl

GROUP = 64
LEAST_KEYS = 64  # of a split
EVERYTHING = 1 << 30  # a window that is none
COMBINED = 64  # columns of a program that combines splits


class Tile(NamedTuple):
    """Queries (tokens times heads) and keys of a step of a program; ``resident`` programs on a multiprocessor."""

    rows: int
    keys: int
    warps: int
    stages: int
    resident: int


def tile_of(table: dict[tuple[int, ...], Tile], *wanted: int) -> Tile:
    """The first tile of ``table`` whose sizes are at least those wanted."""
    return next(tile for most, tile in table.items() if all(map(int.__le__, wanted, most)))


def group_width(size: int) -> int:
    """Elements of a group: ``size`` in as few groups as can be, rounded up to an even number."""
    width = ceil_div(size, ceil_div(size, GROUP))
    return width + width % 2


def row_bytes(size: int, bits: int) -> int:
    """Bytes of a row of ``size`` elements as codes and scales."""
    groups = ceil_div(size, GROUP)
    return groups * group_width(size) * bits // 8 + 2 * groups


def dequantized(rows: Tensor, size: int, bits: int) -> Tensor:
    """Codes and scales uint8 [..., bytes] as elements [..., size] float32; rows of 16 bits are what they are."""
    if bits == 16:
        return rows
    groups, width = ceil_div(size, GROUP), group_width(size)
    count = groups * width * bits // 8
    codes, scales = rows[..., :count], rows[..., count : count + 2 * groups].int()
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    signed = (codes.int() ^ (1 << (bits - 1))) - (1 << (bits - 1))
    scale = ((scales[..., 0::2] | scales[..., 1::2] << 8) << 16).view(torch.float32)
    return (signed.unflatten(-1, (groups, width)) * scale.unsqueeze(-1)).flatten(-2)[..., :size]


def seen(mask: Tensor | None, lengths: Tensor | None, window: int | None, tokens: int, keys: Tensor) -> Tensor:
    """Whether the last ``tokens`` tokens of sequences see ``keys`` [S]: bool [batch or 1, 1, tokens, S]."""
    ends = keys.new_full((1,), len(keys)) if lengths is None else lengths.to(keys.dtype)
    own = (ends[:, None] - tokens + torch.arange(tokens, device=keys.device)).reshape(-1, 1, tokens, 1)
    visible = keys <= own
    if window is not None:
        visible = visible & (keys > own - window)
    return visible if mask is None else visible & mask


def weights_of(scores: Tensor, visible: Tensor, softcap: float | None, sinks: Tensor | None = None) -> Tensor:
    """Softmax of ``scores`` [B, H, T, S] float32 over visible keys; 0 where a token sees none. ``sinks`` [H]."""
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        column = sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    return scores.softmax(-1).nan_to_num(0.0)


def paged(rows: Tensor, table: Tensor) -> Tensor:
    """The rows [batch, blocks * page, ...] of pages [P, page, ...] that ``table`` [batch, blocks] names."""
    return rows[table.long()].flatten(1, 2)


def units(rows: Tensor, bits: int) -> Tensor:
    """A cache as programs read it: in units of two codes."""
    return rows.view(torch.int16) if bits == 8 else rows


def padded(size: int, bits: int) -> tuple[int, int]:
    """Groups and elements of each as a program holds a row: powers of two, and 16 columns at least, 32 of 4 bits."""
    if bits == 16 or size == 0:
        return 1, max(power_of_two(size), 16)
    # Triton 3.6 multiplies wrongly what came as bytes over fewer than 32 elements (kWidth 4 of 16-bit operands).
    return power_of_two(ceil_div(size, GROUP)), max(power_of_two(group_width(size)), 32 if bits == 4 else 16)


def bytes_on_chip(query: Tensor, size: int) -> int:
    """What a row of ``size`` elements takes in a program, which holds it as the query's dtype."""
    return power_of_two(size) * query.element_size()


def layout(prefix: str, rows: Tensor, size: int, bits: int) -> dict[str, int]:
    """The constants ``prefix`` of a cache [..., keys, row] with rows of ``size`` elements; 0: there is none."""
    groups, width = padded(size, bits)
    align = math.gcd(*rows.stride()[:-2], 16)
    values = {"": size, "_STRIDE": rows.stride(-2), "_GROUPS": groups, "_WIDTH": width, "_ALIGN": align}
    return {prefix + name: value for name, value in values.items()}


def query_arguments(name: str, prefix: str, query: Tensor) -> dict[str, Any]:
    """The argument ``name`` of queries [B, T, H, n], and its steps."""
    query = query if query.stride(-1) == 1 else query.contiguous()
    steps = zip(("batch", "token", "head"), query.stride(), strict=False)
    return {name: query} | {f"{prefix}_{axis}": step for axis, step in steps}


def scratch(query: Tensor, splits: int, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """What programs write of ``splits`` for each sequence of ``query``: means of values and logarithms of sums."""
    shape = (query.shape[0], splits, rows)
    return query.new_empty(*shape, size, dtype=torch.float32), query.new_empty(shape, dtype=torch.float32)


def splits_of(blocks: int, extent: int, tile: Tile, processors: int) -> int:
    """Into how many pieces ``extent`` keys are cut so that ``blocks`` times as many programs are on the GPU at once."""
    return max(1, min(tile.resident * processors // max(blocks, 1), extent // max(LEAST_KEYS, tile.keys)))


def mask_arguments(mask: Tensor | None, other: Tensor) -> tuple[dict[str, Any], int]:
    """Arguments of a mask bool [batch or 1, 1, tokens or 1, keys], and whether it is none, one of all tokens or not."""
    if mask is None:
        return {"mask": other, "mask_batch": 0, "mask_token": 0}, 0
    dense = mask if mask.stride(-1) == 1 else mask.contiguous()
    batch, token = (0 if dense.shape[axis] == 1 else dense.stride(axis) for axis in (0, 2))
    return {"mask": dense, "mask_batch": batch, "mask_token": token}, 1 if dense.shape[2] == 1 else 2


def combination(sums: Tensor, logs: Tensor, result: Tensor) -> Launch:
    """What makes ``result`` [B, ..., n] of ``sums`` [B, splits, rows, n] and ``logs`` [B, splits, rows]."""
    batch, splits, rows, size = sums.shape
    arguments = {"sums": sums, "logs": logs, "result": result, "rows": rows, "splits": splits, "size": size}
    constants = {"COLUMNS": COMBINED, "SPLITS": 16}
    return Launch(_combine, (batch * rows, ceil_div(size, COMBINED)), arguments, constants, warps=2)


@jit_for_any("splits")
def _combine(sums, logs, result, rows, splits, size, COLUMNS: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = (row // rows).to(tl.int64) * splits * rows + row % rows
    top = -float("inf")
    total = 0.0
    mixed = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, splits, SPLITS):
        split = start + tl.arange(0, SPLITS)
        place = first + split * rows
        log = tl.load(logs + place, mask=split < splits, other=-float("inf"))
        highest = tl.maximum(top, tl.max(log))
        base = tl.where(highest == -float("inf"), 0.0, highest)
        weight = tl.exp2(log - base)
        inside = (weight > 0)[:, None] & (column < size)[None, :]
        part = tl.load(sums + place[:, None] * size + column[None, :], mask=inside, other=0.0)
        shrunk = tl.exp2(top - base)
        mixed = mixed * shrunk + tl.sum(weight[:, None] * part, 0)
        total = total * shrunk + tl.sum(weight)
        top = highest
    mixed = mixed / tl.where(total > 0, total, 1.0)
    tl.store(result + row.to(tl.int64) * size + column, mixed.to(result.dtype.element_ty), mask=column < size)


@jit
def element_of(SIZE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Which element of a row each of GROUPS * WIDTH columns holds; SIZE or more: none."""
    column = tl.arange(0, GROUPS * WIDTH)
    COUNT: tl.constexpr = (SIZE + 63) // 64
    STEP: tl.constexpr = ((SIZE + COUNT - 1) // COUNT + 1) // 2 * 2
    if BITS < 16 and STEP < WIDTH:
        column = tl.where(column % WIDTH < STEP, column // WIDTH * STEP + column % WIDTH, SIZE)
    return column


@jit
def row_starts(
    table, batch, at, key, inside, rows_batch, table_batch, STRIDE: tl.constexpr, ALIGN: tl.constexpr,
    PAGE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Where the rows of ``key``, KEYS of them from ``at`` on, start, from the first element: int64 [KEYS]."""
    if PAGE and PAGE % KEYS == 0:  # all in one
        page = tl.load(table + batch * table_batch + at // PAGE).to(tl.int64)
        starts = tl.multiple_of(page * rows_batch, ALIGN) + (key % PAGE) * STRIDE
    elif PAGE:
        pages = tl.load(table + batch * table_batch + key // PAGE, mask=inside, other=0).to(tl.int64)
        starts = tl.multiple_of(pages * rows_batch, ALIGN) + (key % PAGE) * STRIDE
    else:
        starts = tl.multiple_of(batch.to(tl.int64) * rows_batch, ALIGN) + key.to(tl.int64) * STRIDE
    return starts


@jit
def rows_at(
    rows, starts, inside, DTYPE: tl.constexpr, SIZE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Rows that start at ``starts`` [N]: [N, GROUPS * WIDTH] of DTYPE, 0 outside."""
    if BITS == 16:
        column = tl.arange(0, WIDTH)
        chosen = inside[:, None] & (column < SIZE)[None, :]
        values = tl.load(rows + starts[:, None] + column[None, :], mask=chosen, other=0.0)
    else:
        values = _coded(rows, starts, inside, SIZE, GROUPS, WIDTH, BITS)
        values = tl.reshape(values, [starts.shape[0], GROUPS * WIDTH])
    return values.to(DTYPE)


@jit
def _coded(
    rows, starts, inside, SIZE: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Codes times scales: [N, GROUPS, WIDTH] float32. ``rows`` in units of two codes."""
    COUNT: tl.constexpr = (SIZE + 63) // 64
    UNITS: tl.constexpr = ((SIZE + COUNT - 1) // COUNT + 1) // 2  # of a group
    group = tl.arange(0, GROUPS)
    present = inside[:, None] & (group < COUNT)[None, :]
    scales = rows + starts[:, None] + COUNT * UNITS + (group * (16 // (2 * BITS)))[None, :]
    scale = tl.load(scales, mask=present, other=0).to(tl.int32)
    if BITS == 4:
        scale = scale | (tl.load(scales + 1, mask=present, other=0).to(tl.int32) << 8)
    unit = tl.arange(0, WIDTH // 2)
    place = (group * UNITS)[None, :, None] + unit[None, None, :]
    chosen = present[:, :, None] & (unit < UNITS)[None, None, :]
    pair = tl.load(rows + starts[:, None, None] + place, mask=chosen, other=0).to(tl.int32)
    # Whole numbers above 2^23 are their own last bits as float32: no conversions, which are slow.
    sign = 8 if BITS == 4 else 128
    codes = tl.join(pair & (2 * sign - 1), (pair >> BITS) & (2 * sign - 1)) ^ (0x4B000000 + sign)
    numbers = tl.reshape(codes, [starts.shape[0], GROUPS, WIDTH]).to(tl.float32, bitcast=True) - (8388608.0 + sign)
    return numbers * (scale << 16).to(tl.float32, bitcast=True)[:, :, None]


@jit
def seen_keys(mask, batch, token, key, own, window, mask_batch, mask_token, inside, MASKED: tl.constexpr):
    """Whether queries of ``token`` [M] at position ``own`` [M] see keys [N]: [M, N]."""
    visible = inside[None, :] & (key[None, :] <= own[:, None]) & (key[None, :] > own[:, None] - window)
    row = mask + batch.to(tl.int64) * mask_batch
    if MASKED == 1:
        visible = visible & (tl.load(row + key, mask=inside, other=0) != 0)[None, :]
    if MASKED == 2:
        place = token.to(tl.int64)[:, None] * mask_token + key[None, :]
        visible = visible & (tl.load(row + place, mask=visible, other=0) != 0)
    return visible


@jit
def logarithms(scores, visible, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores as powers of two, -inf where they are not visible."""
    scores = scores * scale
    if SOFTCAP:
        scores = softcap - 2 * softcap / (1 + tl.exp2(scores * (2 * 1.4426950408889634 / softcap)))
    return tl.where(visible, scores * 1.4426950408889634, -float("inf"))


@jit
def more_scores(scores, total, top):
    """Weights [M, N] of further scores, what earlier ones shrink by, the sum of all and the highest: [M]."""
    highest = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    shrunk = tl.exp2(top - base)
    return weights, shrunk, total * shrunk + tl.sum(weights, 1), highest


@jit
def span(batch, split, lengths, keys, tokens, window, splits, LENGTHS: tl.constexpr, KEYS: tl.constexpr):
    """The sequence's length, and the first key of the split, a multiple of KEYS, and the one after its last."""
    length = keys
    if LENGTHS:
        length = tl.load(lengths + batch).to(tl.int32)
    first = tl.maximum(length - tokens - window + 1, 0) // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(length - first, splits), KEYS) * KEYS
    start = first + split * share
    return length, start, tl.minimum(start + share, length)
