"""Linear map of whose weight N of each M consecutive elements of a row are kept.

    y = x · Wᵀ,   W[r, M · g + position[r, N · g + i]] = values[r, N · g + i]  for i < N, and 0 elsewhere

Positions in their groups are numbers of 2 bits where M ≤ 4 and of 4 bits where M ≤ 16, packed along the rows as
packed_weight.py packs codes. Bytes moved: values and positions once; x is read where the positions say, and must stay
in a cache. For more than a few tokens W is written out, and torch multiplies. CPUs have no product that is faster than
the dense one: they keep W dense.
"""

# pyright: basic
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .kept import kept
from .launch import Launch, Plan, Product, ceil_div, first_reason, jit, operation, power_of_two, tl
from .packed_weight import unpacked


class Tile(NamedTuple):
    """Blocks of ``rows`` of W and of ``columns`` of its kept values; ``widened``: W is written out."""

    widened: bool
    rows: int
    columns: int
    warps: int
    stages: int


# Most tokens -> the tile.
TILES = {
    1: Tile(False, 4, 512, 4, 1),
    8: Tile(False, 2, 256, 2, 1),
    1 << 62: Tile(True, 4, 256, 4, 1),
}


def bits_of(period: int) -> int:
    """Bits of a position in a group of ``period``."""
    return 2 if period <= 4 else 4


def compressed(weight: Tensor, count: int, period: int) -> tuple[Tensor, Tensor]:
    """Values and positions of ``weight`` [N, K]: of each ``period`` elements the ``count`` of largest magnitude."""
    groups = weight.unflatten(-1, (-1, period))
    places = groups.abs().topk(count, -1).indices.sort(-1).values
    bits = bits_of(period)
    codes = functional.pad(places.flatten(-2), (0, -places[0].numel() % (32 // bits)))
    octets = codes.unflatten(-1, (-1, 8 // bits)) << (torch.arange(8 // bits, device=weight.device) * bits)
    return groups.gather(-1, places).flatten(-2), octets.sum(-1).to(torch.uint8).view(torch.int32)


def reference(x: Tensor, values: Tensor, positions: Tensor, period: int) -> Tensor:
    """y [..., N] in x's dtype, summed in float32.

    x [..., K] floating point, ``values`` [N, K / period · kept] floating point, ``positions`` int32
    [N, ceil(K / period · kept · bits / 32)] with ``bits_of(period)``, at which no group has two values.
    """
    return (x.float() @ dense(values.float(), positions, period, x.shape[-1]).mT).to(x.dtype)


def dense(values: Tensor, positions: Tensor, period: int, width: int) -> Tensor:
    """W [N, width] in the dtype of ``values``."""
    rows, held = values.shape
    groups = torch.arange(width // period, device=values.device).repeat_interleave(held * period // width)
    places = groups * period + unpacked(positions, bits_of(period), held)
    return values.new_zeros(rows, width).scatter(1, places, values)


@jit
def _places(positions, row, start, words, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BITS: tl.constexpr):
    """int32 [ROWS, COLUMNS]: positions in their groups of the kept values from ``start`` on."""
    word = start * BITS // 32 + tl.arange(0, COLUMNS * BITS // 32)[None, :]
    held = tl.load(positions + row * words + tl.minimum(word, words - 1))
    return ((held[:, :, None] >> (tl.arange(0, 32 // BITS) * BITS)) & (2**BITS - 1)).reshape(ROWS, COLUMNS)


@jit
def _gathered(
    x, values, positions, y, tokens, rows, width, held, words,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr, PERIOD: tl.constexpr,
    BITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(first, rows - 1).to(tl.int64)[:, None]
    token = tl.arange(0, TOKENS)
    total = tl.zeros([TOKENS, ROWS, COLUMNS], tl.float32)
    for start in tl.range(0, held, COLUMNS, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
        column = start + tl.arange(0, COLUMNS)[None, :]
        value = tl.load(values + row * held + column, mask=column < held, other=0.0).to(tl.float32)
        place = column // COUNT * PERIOD + _places(positions, row, start, words, ROWS, COLUMNS, BITS)
        here = (token < tokens)[:, None, None] & (column < held)[None, :, :]
        taken = tl.load(x + token[:, None, None] * width + place[None, :, :], mask=here, other=0.0)
        total += taken.to(tl.float32) * value[None, :, :]
    result = tl.sum(total, 2).to(y.dtype.element_ty)
    inside = (token < tokens)[:, None] & (first < rows)[None, :]
    tl.store(y + token[:, None] * rows + first[None, :], result, mask=inside)


@jit
def _widened(
    values, positions, weight, rows, width, held, words,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, COUNT: tl.constexpr, PERIOD: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(first, rows - 1).to(tl.int64)[:, None]
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :]
    slot = tl.arange(0, PERIOD)[None, None, :]
    found = tl.zeros([ROWS, GROUPS, PERIOD], weight.dtype.element_ty)
    for index in tl.static_range(COUNT):  # pyright: ignore[reportGeneralTypeIssues]
        column = tl.minimum(group * COUNT + index, held - 1)
        value = tl.load(values + row * held + column).to(weight.dtype.element_ty)
        bit = column * BITS
        place = (tl.load(positions + row * words + bit // 32) >> (bit % 32)) & (2**BITS - 1)
        found = tl.where(slot == place[:, :, None], value[:, :, None], found)
    at = group[:, :, None] * PERIOD + slot
    inside = (first < rows)[:, None, None] & (at < width)
    tl.store(weight + row[:, :, None] * width + at, found, mask=inside)


def outside(x: Tensor, values: Tensor, positions: Tensor, period: int) -> str | None:
    """Why the inputs are not for the kernels."""
    return first_reason(
        [
            (x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"{x.dtype} is no dtype of activations"),
            (period in (2, 4, 8, 16), f"groups of {period} elements"),
            (x.shape[-1] % period == 0, f"groups of {period} do not divide {x.shape[-1]} inputs"),
            (values.is_contiguous() and positions.is_contiguous(), "the weight is not contiguous"),
        ]
    )


def plan(x: Tensor, values: Tensor, positions: Tensor, period: int, tile: Tile | None = None) -> Plan:
    """One launch; one, and torch's product, for many tokens."""
    x = x.contiguous()
    width, (rows, held) = x.shape[-1], values.shape
    tokens = x.numel() // width
    tile = tile or next(each for most, each in TILES.items() if tokens <= most)
    y = x.new_empty(*x.shape[:-1], rows)
    arguments = {"values": values, "positions": positions, "rows": rows, "width": width, "held": held}
    arguments["words"] = positions.shape[-1]
    constants = {"ROWS": tile.rows, "COUNT": held * period // width, "PERIOD": period, "BITS": bits_of(period)}
    if tile.widened:
        weight = x.new_empty(rows, width)
        grid = (ceil_div(rows, tile.rows), ceil_div(width // period, tile.columns))
        constants["GROUPS"] = tile.columns
        launch = Launch(_widened, grid, {**arguments, "weight": weight}, constants, tile.warps, tile.stages)
        return Plan(y, [launch, Product(x, weight, y)])
    arguments |= {"x": x, "y": y, "tokens": tokens}
    constants |= {"TOKENS": power_of_two(tokens), "COLUMNS": tile.columns, "STAGES": tile.stages}
    return Plan(y, [Launch(_gathered, (ceil_div(rows, tile.rows),), arguments, constants, tile.warps, tile.stages)])


def sparse_linear(x: Tensor, values: Tensor, positions: Tensor, period: int) -> Tensor:
    """y [..., N], as ``reference`` says."""
    weight = kept(
        ("dense", period, x.dtype),
        lambda: dense(values.to(x.dtype), positions, period, x.shape[-1]),
        values,
        positions,
    )
    return functional.linear(x, weight)


def _shaped(x: Tensor, values: Tensor, positions: Tensor, period: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


sparse_linear = operation(sparse_linear, reference, plan, outside, _shaped)
