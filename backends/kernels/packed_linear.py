"""Linear map whose weight is codes of 2 to 8 bits, packed densely, with a scale for each group of inputs.

    y = x · Wᵀ,   W[n, k] = (code[n, k] - zero[n, g]) · scale[n, g],   g = k // (K / G)

How codes and zero points lie in their words: packed_weight.py. Bytes moved: words, scales and zero points once, unless
there are more tokens than a block holds; x and y are small. Two designs:

    "matrix"   codes less their zero points, which are exact in x's dtype, go to the matrix units, group by group, and
               scales to the groups' sums; K is split while there are few blocks, the splits' sums go through scratch
               and are added in order
    "widened"  W is written out in x's dtype and torch multiplies: for so many tokens that this costs little

A code becomes a number without a conversion when it is put into a mantissa: c + 128 in bfloat16, c + 1024 in float16.
"""

# pyright: basic, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false
# pyright: reportArgumentType=false
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import INTERPRETED, Launch, Plan, Product, ceil_div, first_reason, jit, operation, tl
from .packed_weight import dense, on_cpu
from .splits import added, parts_of, share_of

UNIT = 32
"""Codes that fill a whole number of words, one for each bit."""


class Tile(NamedTuple):
    """Blocks of ``rows`` of W, ``units`` of 32 inputs, ``tokens`` of x; ``splits`` of K, 0: as many as fill a GPU."""

    design: str
    tokens: int
    rows: int
    units: int
    warps: int
    stages: int
    splits: int = 0


# Most tokens -> the tile.
TILES = {
    16: Tile("matrix", 16, 64, 4, 4, 3),
    32: Tile("matrix", 32, 64, 4, 4, 3),
    128: Tile("matrix", 64, 64, 4, 4, 3),
    1 << 62: Tile("widened", 1, 16, 16, 4, 1),
}


def reference(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """y [..., N] in x's dtype, summed in float32.

    x [..., K] floating point, ``words`` int32 [N, ceil(K · bits / 32)], ``scales`` [N, G] floating point, ``zeros``
    int32 [ceil(N · bits / 32), G] or None.
    """
    return (x.float() @ dense(words, scales, zeros, bits, x.shape[-1]).mT).to(x.dtype)


@jit
def codes_at(words, unit, ROWS: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr):
    """int32 [ROWS, UNITS, 32]: the codes of ``unit`` [ROWS, UNITS], counted from the first of W."""
    if 32 % BITS == 0:
        held = tl.load(words + unit[:, :, None] * BITS + tl.arange(0, BITS))
        offset = tl.arange(0, 32 // BITS) * BITS
        code = (held[:, :, :, None] >> offset) & (2**BITS - 1)
        return code.reshape(ROWS, UNITS, 32)
    bit = tl.arange(0, 32)[None, None, :] * BITS
    word, offset = bit // 32, bit % 32
    low = tl.zeros([ROWS, UNITS, 32], tl.int32)
    high = tl.zeros([ROWS, UNITS, 32], tl.int32)
    for place in tl.static_range(BITS):
        held = tl.load(words + unit * BITS + place)[:, :, None]
        low = tl.where(word == place, held, low)
        high = tl.where(word + 1 == place, held, high)
    return _across(low, high, offset, BITS)


@jit
def _across(low, high, offset, BITS: tl.constexpr):
    """Codes that start at bit ``offset`` of words ``low`` and may end in ``high``."""
    return ((low >> offset) & (2**BITS - 1) & ~(-1 << (32 - offset))) | ((high << (32 - offset)) & (2**BITS - 1))


@jit
def zeros_at(zeros, row, group, rows, groups, BITS: tl.constexpr, ZEROS: tl.constexpr):
    """float32: the zero points of ``row`` and ``group``, which broadcast."""
    zero = tl.zeros_like(row + group) + 2 ** (BITS - 1)
    if ZEROS:
        bit = row * BITS
        word, offset = bit // 32, bit % 32
        held = tl.load(zeros + word * groups + group)
        if 32 % BITS == 0:
            zero = (held >> offset) & (2**BITS - 1)
        else:
            following = tl.minimum(word + 1, (rows * BITS - 1) // 32)
            zero = _across(held, tl.load(zeros + following * groups + group), offset, BITS)
    return zero.to(tl.float32)


@jit
def scales_at(scales, zeros, row, group, rows, groups, BITS: tl.constexpr, ZEROS: tl.constexpr):
    """float32: the scales and zero points of ``row`` and ``group``, which broadcast."""
    scale = tl.load(scales + row * groups + group).to(tl.float32)
    return scale, zeros_at(zeros, row, group, rows, groups, BITS, ZEROS)


@jit
def affine_at(scales, zeros, row, group, rows, groups, BITS: tl.constexpr, ZEROS: tl.constexpr):
    """float32 [ROWS, UNITS] a and b of codes c: W = a · (2^BITS + c) + b."""
    scale, zero = scales_at(scales, zeros, row, group, rows, groups, BITS, ZEROS)
    return scale, scale * -(2**BITS + zero)


@jit
def weights_at(
    words,
    scales,
    zeros,
    row,
    unit,
    rows,
    units,
    groups,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
):
    """float32 [ROWS, UNITS, 32]: W at ``row`` [ROWS, 1] and ``unit`` [1, UNITS]; groups are of SPAN units.

    Beyond the end it is what the last row or unit is, so that no load needs a mask: such columns meet zeros of x.
    """
    row, unit = tl.minimum(row, rows - 1), tl.minimum(unit, units - 1)
    code = codes_at(words, row * units + unit, ROWS, UNITS, BITS)
    number = ((code << (23 - BITS)) | ((127 + BITS) << 23)).to(tl.float32, bitcast=True)
    scale, shift = affine_at(scales, zeros, row, unit // SPAN, rows, groups, BITS, ZEROS)
    return number * scale[:, :, None] + shift[:, :, None]


@jit
def integers_at(
    words, row, unit, rows, units,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """[ROWS, UNITS * 32] of DTYPE: codes less 2^(BITS - 1), which are exact in all dtypes.

    Half of the codes of a word lie 16 bits above the other half. They are put in pairs into the mantissas of two
    numbers, and stay neighbours: ``in_order`` brings inputs into this order.
    """
    HALF: tl.constexpr = tl.float16 == DTYPE
    NARROW: tl.constexpr = HALF or (tl.bfloat16 == DTYPE and BITS < 8)
    BASE: tl.constexpr = 2 ** (BITS - 1) + (1024 if HALF else 128 if NARROW else 8388608)
    row, unit = tl.minimum(row, rows - 1), tl.minimum(unit, units - 1)
    if NARROW and 32 % BITS == 0:
        held = tl.load(words + (row * units + unit)[:, :, None] * BITS + tl.arange(0, BITS))
        offset = tl.arange(0, 16 // BITS) * BITS
        MAGIC: tl.constexpr = 0x64006400 if HALF else 0x43004300
        pair = ((held[:, :, :, None] >> offset) & ((2**BITS - 1) * 0x10001)) | MAGIC
        low, high = pair.to(tl.int16).to(DTYPE, bitcast=True), (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        number = tl.join(low, high).reshape(ROWS, UNITS * 32)
    elif NARROW:
        code = codes_at(words, row * units + unit, ROWS, UNITS, BITS)
        number = (code | (0x6400 if HALF else 0x4300)).to(tl.int16).to(DTYPE, bitcast=True)
        number = number.reshape(ROWS, UNITS * 32)
    else:
        code = codes_at(words, row * units + unit, ROWS, UNITS, BITS)
        number = (code | 0x4B000000).to(tl.float32, bitcast=True).reshape(ROWS, UNITS * 32)
    if WIDE:
        number = number.to(tl.float32)
    return (number - BASE).to(tl.float32 if WIDE else DTYPE)


@jit
def in_order(value, TOKENS: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr):
    """Inputs [TOKENS, UNITS * 32] in the order that ``integers_at`` has codes of their dtype in."""
    if 32 % BITS == 0 and (value.dtype == tl.float16 or (value.dtype == tl.bfloat16 and BITS < 8)):
        halves = value.reshape(TOKENS, UNITS * BITS, 2, 16 // BITS)
        value = tl.permute(halves, (0, 1, 3, 2)).reshape(TOKENS, UNITS * 32)
    return value


@jit
def sums_of_group(
    value, words, scale, zero, row, unit, rows, units,
    ROWS: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr, ZEROS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, TOKENS]: W times inputs ``value`` in order [TOKENS, UNITS * 32]; ``scale`` and ``zero`` [ROWS]."""
    code = integers_at(words, row, unit, rows, units, value.dtype, ROWS, UNITS, BITS, WIDE)
    if WIDE:
        value = value.to(tl.float32)
    summed = tl.dot(code, tl.trans(value), input_precision="ieee")
    if ZEROS:
        summed += (2 ** (BITS - 1) - zero)[:, None] * tl.sum(value.to(tl.float32), 1)[None, :]
    return summed * scale[:, None]


@jit
def _matrix(
    x, words, scales, zeros, y, tokens, rows, units, groups, share,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr,
    ZEROS: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y [splits, tokens, rows]: each split's sum, over ``share`` units."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    held = tl.minimum(tl.program_id(1) * ROWS + tl.arange(0, ROWS), rows - 1)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, units)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    scale, zero = scales_at(scales, zeros, held, first // SPAN, rows, groups, BITS, ZEROS)
    for start in tl.range(first, last, UNITS, num_stages=STAGES):
        # Numbers of two bytes are not copied ahead by the compiler: those of the next step are asked for here.
        group = tl.minimum((start + UNITS) // SPAN, groups - 1)
        next_scale, next_zero = scales_at(scales, zeros, held, group, rows, groups, BITS, ZEROS)
        column = start * 32 + tl.arange(0, UNITS * 32)[None, :]
        here = (token < tokens) & (column < last * 32)
        value = tl.load(x + token.to(tl.int64) * units * 32 + column, mask=here, other=0.0)
        value = in_order(value, TOKENS, UNITS, BITS)
        unit = start + tl.arange(0, UNITS)[None, :]
        total += sums_of_group(
            value, words, scale, zero, row, unit, rows, units, ROWS, UNITS, BITS, ZEROS, WIDE
        )  # fmt: skip
        scale, zero = next_scale, next_zero
    place = (tl.program_id(2) * tokens + token.reshape(1, TOKENS)).to(tl.int64) * rows + row
    inside = (token.reshape(1, TOKENS) < tokens) & (row < rows)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@jit
def _widened(
    words,
    scales,
    zeros,
    weight,
    rows,
    units,
    groups,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    BITS: tl.constexpr,
    SPAN: tl.constexpr,
    ZEROS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    unit = (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[None, :]
    inside = (row < rows) & (unit < units)
    values = weights_at(
        words, scales, zeros, row, unit, rows, units, groups, ROWS, UNITS, BITS, SPAN, ZEROS
    )  # fmt: skip
    place = (row.to(tl.int64) * units + unit)[:, :, None] * 32 + tl.arange(0, 32)
    tl.store(weight + place, values.to(weight.dtype.element_ty), mask=inside[:, :, None])


def outside(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> str | None:
    """Why the inputs are not for the kernels."""
    width, groups = x.shape[-1], scales.shape[-1]
    return first_reason(
        [
            (x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"{x.dtype} is no dtype of activations"),
            (2 <= bits <= 8, f"codes of {bits} bits"),
            (width % (UNIT * groups) == 0, f"{groups} groups of {width} inputs are not of a multiple of {UNIT}"),
            (words.is_contiguous() and scales.is_contiguous(), "the weight is not contiguous"),
            (zeros is None or zeros.is_contiguous(), "the zero points are not contiguous"),
        ]
    )


def plan(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, tile: Tile | None = None) -> Plan:
    """One launch; two where K is split; one, and torch's product, for many tokens."""
    x = x.contiguous()
    tokens, rows = x.numel() // x.shape[-1], words.shape[0]
    tile = tile or next(each for most, each in TILES.items() if tokens <= most)
    y = x.new_empty(*x.shape[:-1], rows)
    weight = packed_arguments(x, words, scales, zeros)
    constants = {**packed_constants(x, scales, zeros, bits), "ROWS": tile.rows, "UNITS": tile.units}
    if tile.design == "matrix":
        tile = within_groups(tile, constants["SPAN"])
        constants["UNITS"] = tile.units
    if tile.design == "widened":
        return _widened_plan(x, y, weight, constants, tile)
    arguments = {**weight, "x": x, "y": y, "tokens": tokens}
    constants |= {"STAGES": tile.stages, "TOKENS": tile.tokens}
    return _matrix_plan(y, arguments, constants, tile)


def packed_arguments(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None) -> dict[str, Tensor | int]:
    """What kernels are told of a weight."""
    units = x.shape[-1] // UNIT
    sizes = {"rows": words.shape[0], "units": units, "groups": scales.shape[-1]}
    return {"words": words, "scales": scales, "zeros": words if zeros is None else zeros, **sizes}


def packed_constants(x: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> dict[str, int | bool]:
    """What kernels for a weight are compiled for."""
    return {"BITS": bits, "SPAN": x.shape[-1] // UNIT // scales.shape[-1], "ZEROS": zeros is not None}


def within_groups(tile: Tile, span: int) -> Tile:
    """The tile with no more units than divide ``span``, those of a group."""
    return tile._replace(units=min(tile.units, span & -span))


def _matrix_plan(y: Tensor, arguments: dict[str, Tensor | int], constants: dict[str, int | bool], tile: Tile) -> Plan:
    tokens, rows, units = (int(arguments[name]) for name in ("tokens", "rows", "units"))
    blocks = (ceil_div(tokens, tile.tokens), ceil_div(rows, tile.rows))
    share = share_of(ceil_div(units, tile.units), blocks[0] * blocks[1], y, tile.splits) * tile.units
    splits = ceil_div(units, share)
    parts = parts_of(y, splits)
    arguments = {**arguments, "y": parts, "share": share}
    constants = {**constants, "WIDE": INTERPRETED}
    launch = Launch(_matrix, (*blocks, splits), arguments, constants, tile.warps, tile.stages)
    return Plan(y, [launch, *added(parts, y)])


def _widened_plan(
    x: Tensor, y: Tensor, arguments: dict[str, Tensor | int], constants: dict[str, int | bool], tile: Tile
) -> Plan:
    weight = x.new_empty(y.shape[-1], x.shape[-1])
    return Plan(y, [widened(weight, arguments, constants, tile), Product(x, weight, y)])


def widened(weight: Tensor, arguments: dict[str, Tensor | int], constants: dict[str, int | bool], tile: Tile) -> Launch:
    """The launch that writes the weight [N, K] in its dtype."""
    rows, width = weight.shape
    grid = (ceil_div(rows, tile.rows), ceil_div(width // UNIT, tile.units))
    return Launch(_widened, grid, {**arguments, "weight": weight}, constants, tile.warps, tile.stages)


def packed_linear(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """y [..., N], as ``reference`` says."""
    return on_cpu(x, words, scales, zeros, bits)


def _shaped(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


packed_linear = operation(packed_linear, reference, plan, outside, _shaped)
