"""Linear map whose weight is looked up: indices into tables of scalars or vectors, several of which may be added.

    y = x · Wᵀ,   W[n, v · j + e] = scale[n] · Σ_c codebooks[b, c, indices[c, n, j], e],   b = n // (N / B)

There is one set of C codebooks for each of B blocks of rows; B = 1 is one set for the matrix. With v = 1 the codebooks
are look-up tables of scalars (k-means), with v > 1 those of vector quantisation. Bytes moved: the indices once, unless
there are more tokens than a block holds; the codebooks are read at random and must stay in a cache.
Source: Egiazarian et al., Extreme Compression of Large Language Models via Additive Quantization, 2024.

CPUs have no product with looked-up weights that is faster than the dense one: they keep W dense.
"""

# pyright: basic
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .kept import kept
from .launch import INTERPRETED, Launch, Plan, ceil_div, first_reason, jit, operation, tl
from .splits import added, parts_of, share_of


class Tile(NamedTuple):
    """Blocks of ``tokens`` of x, ``rows`` of W and ``width`` of K; ``splits`` of K, 0: as many as fill a GPU."""

    tokens: int
    rows: int
    width: int
    warps: int
    stages: int
    splits: int = 0


# Most tokens -> the tile.
TILES = {16: Tile(16, 64, 128, 4, 1), 32: Tile(32, 64, 128, 4, 1), 1 << 62: Tile(64, 64, 128, 4, 1)}


def reference(x: Tensor, indices: Tensor, codebooks: Tensor, scales: Tensor | None) -> Tensor:
    """y [..., N] in x's dtype, summed in float32.

    x [..., K] floating point; ``indices`` [C, N, K / v], uint8, or int16 whose bits are an unsigned number;
    ``codebooks`` [B, C, entries, v] floating point; ``scales`` [N] or None.
    """
    return (x.float() @ dense(indices, codebooks, scales).mT).to(x.dtype)


def dense(indices: Tensor, codebooks: Tensor, scales: Tensor | None) -> Tensor:
    """W float32 [N, K]."""
    indices = indices.int() & (0xFF if indices.dtype == torch.uint8 else 0xFFFF)
    blocks = zip(codebooks.float(), indices.chunk(codebooks.shape[0], 1), strict=True)
    weight = torch.cat([_looked_up(tables, each) for tables, each in blocks])
    return weight if scales is None else weight * scales.float()[:, None]


def _looked_up(tables: Tensor, indices: Tensor) -> Tensor:
    """Sums over C of entries: [rows, K] of ``tables`` [C, entries, v] and ``indices`` [C, rows, K / v]."""
    return torch.stack([table[each] for table, each in zip(tables, indices, strict=True)]).sum(0).flatten(-2)


@jit
def _codebook_linear(
    x, indices, codebooks, scales, y, tokens, rows, columns, entries, block_rows, share,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr, BOOKS: tl.constexpr,
    MASK: tl.constexpr, SCALES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y [splits, tokens, rows]: each split's sum, over ``share`` of the columns of indices."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, columns)
    held = tl.minimum(row, rows - 1)[:, None]
    books = held // block_rows * BOOKS * entries
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    for start in range(first, last, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        weight = tl.zeros([ROWS, COLUMNS, VECTOR], tl.float32)
        for book in tl.static_range(BOOKS):  # pyright: ignore[reportGeneralTypeIssues]
            place = (book * rows + held).to(tl.int64) * columns + column
            index = tl.load(indices + place, mask=column < last, other=0).to(tl.int32) & MASK
            entry = (books + book * entries + index)[:, :, None] * VECTOR + tl.arange(0, VECTOR)
            weight += tl.load(codebooks + entry).to(tl.float32)
        across = start * VECTOR + tl.arange(0, COLUMNS * VECTOR)[None, :]
        here = (token < tokens) & (across < last * VECTOR)
        value = tl.load(x + token.to(tl.int64) * columns * VECTOR + across, mask=here, other=0.0)
        weight = weight.reshape(ROWS, COLUMNS * VECTOR).to(value.dtype)
        if WIDE:
            value, weight = value.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(weight, tl.trans(value), total, input_precision="ieee")
    if SCALES:
        total *= tl.load(scales + held).to(tl.float32)
    token, row = token.reshape(1, TOKENS), row[:, None]
    place = (tl.program_id(2) * tokens + token).to(tl.int64) * rows + row
    tl.store(y + place, total.to(y.dtype.element_ty), mask=(token < tokens) & (row < rows))


def outside(x: Tensor, indices: Tensor, codebooks: Tensor, scales: Tensor | None) -> str | None:
    """Why the inputs are not for the kernel."""
    vector = codebooks.shape[-1]
    return first_reason(
        [
            (x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"{x.dtype} is no dtype of activations"),
            (indices.dtype in (torch.uint8, torch.int16), f"indices of {indices.dtype}"),
            (vector in (1, 2, 4, 8), f"vectors of {vector} elements"),
            (indices.is_contiguous() and codebooks.is_contiguous(), "the weight is not contiguous"),
        ]
    )


def plan(x: Tensor, indices: Tensor, codebooks: Tensor, scales: Tensor | None, tile: Tile | None = None) -> Plan:
    """One launch; two where K is split."""
    x = x.contiguous()
    tokens = x.numel() // x.shape[-1]
    tile = tile or next(each for most, each in TILES.items() if tokens <= most)
    (books, rows, columns), (sets, _, entries, vector) = indices.shape, codebooks.shape
    wide = max(tile.width // vector, 1)
    blocks = (ceil_div(tokens, tile.tokens), ceil_div(rows, tile.rows))
    share = share_of(ceil_div(columns, wide), blocks[0] * blocks[1], x, tile.splits) * wide
    y = x.new_empty(*x.shape[:-1], rows)
    parts = parts_of(y, ceil_div(columns, share))
    arguments = {"x": x, "indices": indices, "codebooks": codebooks, "scales": x if scales is None else scales}
    arguments |= {"y": parts, "tokens": tokens, "rows": rows, "columns": columns, "entries": entries}
    arguments |= {"block_rows": rows // sets, "share": share}
    constants = {"TOKENS": tile.tokens, "ROWS": tile.rows, "COLUMNS": wide, "VECTOR": vector, "BOOKS": books}
    constants |= {"MASK": 0xFF if indices.dtype == torch.uint8 else 0xFFFF, "SCALES": scales is not None}
    constants["WIDE"] = INTERPRETED
    grid = (*blocks, ceil_div(columns, share))
    return Plan(y, [Launch(_codebook_linear, grid, arguments, constants, tile.warps, tile.stages), *added(parts, y)])


def codebook_linear(x: Tensor, indices: Tensor, codebooks: Tensor, scales: Tensor | None) -> Tensor:
    """y [..., N], as ``reference`` says."""
    others = (codebooks,) if scales is None else (codebooks, scales)
    weight = kept(x.dtype, lambda: dense(indices, codebooks, scales).to(x.dtype), indices, *others)
    return functional.linear(x, weight)


def _shaped(x: Tensor, indices: Tensor, codebooks: Tensor, scales: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], indices.shape[1])


codebook_linear = operation(codebook_linear, reference, plan, outside, _shaped)
