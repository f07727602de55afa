"""The gated product of an MLP whose two weights are packed codes, in one launch for few tokens.

    y = silu(x · gateᵀ) · (x · upᵀ)

Weights are as packed_linear.py has them, both of one shape, number of bits and size of groups. Bytes moved: those of
both weights once, unless there are more tokens than a block holds; neither product goes to memory. For many tokens each
is a packed linear map, and one launch more joins them. Source: Shazeer, GLU Variants Improve Transformer, 2020.
"""

# pyright: basic
from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from . import packed_linear as linear
from .launch import INTERPRETED, Launch, Plan, ceil_div, first_reason, jit, operation, tl
from .packed_linear import (
    Tile,
    in_order,
    packed_arguments,
    packed_constants,
    scales_at,
    sums_of_group,
    within_groups,
)
from .packed_weight import on_cpu

JOINED = 1024  # results of a program that joins the products
# Most tokens -> the tile; "widened": two packed linear maps.
TILES = {
    16: Tile("matrix", 16, 64, 4, 4, 3),
    32: Tile("matrix", 32, 64, 4, 4, 3),
    64: Tile("matrix", 64, 64, 4, 4, 3),
    1 << 62: Tile("widened", 1, 16, 16, 4, 1),
}


def reference(
    x: Tensor,
    gate_words: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    up_words: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    bits: int,
) -> Tensor:
    """y [..., N] in x's dtype, of x [..., K]; both products and what is made of them in float32."""
    gate = linear.reference(x.float(), gate_words, gate_scales, gate_zeros, bits)
    up = linear.reference(x.float(), up_words, up_scales, up_zeros, bits)
    return (functional.silu(gate) * up).to(x.dtype)


@jit
def _gated(gate, up):
    return gate * tl.sigmoid(gate) * up


@jit
def _pair(
    x, words, scales, zeros, up_words, up_scales, up_zeros, y, tokens, rows, units, groups,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BITS: tl.constexpr, SPAN: tl.constexpr,
    ZEROS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    held = tl.minimum(tl.program_id(1) * ROWS + tl.arange(0, ROWS), rows - 1)
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS))[:, None]
    gate = tl.zeros([ROWS, TOKENS], tl.float32)
    up = tl.zeros([ROWS, TOKENS], tl.float32)
    scale, zero = scales_at(scales, zeros, held, 0, rows, groups, BITS, ZEROS)
    up_scale, up_zero = scales_at(up_scales, up_zeros, held, 0, rows, groups, BITS, ZEROS)
    for start in range(0, units, UNITS):
        group = tl.minimum((start + UNITS) // SPAN, groups - 1)
        next_scale, next_zero = scales_at(scales, zeros, held, group, rows, groups, BITS, ZEROS)
        next_up_scale, next_up_zero = scales_at(up_scales, up_zeros, held, group, rows, groups, BITS, ZEROS)
        column = start * 32 + tl.arange(0, UNITS * 32)[None, :]
        here = (token < tokens) & (column < units * 32)
        value = tl.load(x + token.to(tl.int64) * units * 32 + column, mask=here, other=0.0)
        value = in_order(value, TOKENS, UNITS, BITS)
        unit = start + tl.arange(0, UNITS)[None, :]
        gate += sums_of_group(
            value, words, scale, zero, row, unit, rows, units, ROWS, UNITS, BITS, ZEROS, WIDE
        )  # fmt: skip
        up += sums_of_group(
            value, up_words, up_scale, up_zero, row, unit, rows, units, ROWS, UNITS, BITS, ZEROS, WIDE
        )  # fmt: skip
        scale, zero, up_scale, up_zero = next_scale, next_zero, next_up_scale, next_up_zero
    token = token.reshape(1, TOKENS)
    result = _gated(gate, up).to(y.dtype.element_ty)
    tl.store(y + token.to(tl.int64) * rows + row, result, mask=(token < tokens) & (row < rows))


@jit
def _joined(gate, up, y, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    one = tl.load(gate + place, mask=place < size, other=0.0).to(tl.float32)
    other = tl.load(up + place, mask=place < size, other=0.0).to(tl.float32)
    tl.store(y + place, _gated(one, other).to(y.dtype.element_ty), mask=place < size)


def outside(
    x: Tensor,
    gate_words: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    up_words: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    bits: int,
) -> str | None:
    """Why the inputs are not for the kernels."""
    alike = gate_words.shape == up_words.shape and gate_scales.shape == up_scales.shape
    return (
        linear.outside(x, gate_words, gate_scales, gate_zeros, bits)
        or linear.outside(x, up_words, up_scales, up_zeros, bits)
        or first_reason(
            [
                (alike, "the weights have different shapes"),
                ((gate_zeros is None) == (up_zeros is None), "one of the weights has zero points"),
            ]
        )
    )


def plan(
    x: Tensor,
    gate_words: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    up_words: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    bits: int,
    tile: Tile | None = None,
) -> Plan:
    """One launch; for many tokens those of two packed linear maps and one."""
    x = x.contiguous()
    tokens, rows = x.numel() // x.shape[-1], gate_words.shape[0]
    tile = tile or next(each for most, each in TILES.items() if tokens <= most)
    y = x.new_empty(*x.shape[:-1], rows)
    gate, up = (gate_words, gate_scales, gate_zeros), (up_words, up_scales, up_zeros)
    if tile.design == "widened":
        return _apart(x, y, linear.plan(x, *gate, bits), linear.plan(x, *up, bits))
    others = {"up_words": up_words, "up_scales": up_scales, "up_zeros": up_words if up_zeros is None else up_zeros}
    arguments = {**packed_arguments(x, *gate), **others, "x": x, "y": y, "tokens": tokens}
    constants = packed_constants(x, gate_scales, gate_zeros, bits)
    tile = within_groups(tile, constants["SPAN"])
    constants |= {"ROWS": tile.rows, "UNITS": tile.units, "TOKENS": tile.tokens}
    constants["WIDE"] = INTERPRETED
    grid = (ceil_div(tokens, tile.tokens), ceil_div(rows, tile.rows))
    return Plan(y, [Launch(_pair, grid, arguments, constants, tile.warps, tile.stages)])


def _apart(x: Tensor, y: Tensor, gate: Plan, up: Plan) -> Plan:
    arguments = {"gate": gate.result, "up": up.result, "y": y, "size": y.numel()}
    last = Launch(_joined, (ceil_div(y.numel(), JOINED),), arguments, {"BLOCK": JOINED})
    return Plan(y, [*gate.launches, *up.launches, last])


def packed_swiglu(
    x: Tensor,
    gate_words: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    up_words: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    bits: int,
) -> Tensor:
    """y [..., N], as ``reference`` says."""
    gate = on_cpu(x, gate_words, gate_scales, gate_zeros, bits)
    return functional.silu(gate).mul_(on_cpu(x, up_words, up_scales, up_zeros, bits))


def _shaped(
    x: Tensor,
    gate_words: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    up_words: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    bits: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate_words.shape[0])


packed_swiglu = operation(packed_swiglu, reference, plan, outside, _shaped)
