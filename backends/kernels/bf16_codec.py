"""bfloat16 without loss in about 11 bits: exponents of weights are few, so the frequent ones get short codes.

A weight's sign and mantissa lie in a byte of their own. Its exponent has one of 22 symbols, by frequency:

    0 to 2     two bits
    3 to 5     two bits that are 3, then two more
    6 to 20    those, then four
    others     those, then the eight bits of the exponent itself

``first`` holds the first two bits of all, 16 to a word, little-endian. The further bits of a block of 2048 weights lie
from ``starts`` on in ``escapes``: all second codes, all third codes, all plain exponents, each padded to a byte. How
many come before a weight's own is a prefix sum, so that a block is decoded by all threads at once, where a Huffman code
would be followed bit by bit. Bytes moved: what is stored and the result, once each.
Source: the split of bfloat16 is that of Zhang et al., DFloat11, 2025.
"""

# pyright: basic, reportOptionalMemberAccess=false, reportOperatorIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Launch, Plan, ceil_div, first_reason, jit, operation, tl

BLOCK = 2048
WORD = 16  # codes of two bits in an int32
SHORT, END = 2, 3  # bits of the first code, and the code that another follows
DEEPER = ((3, 2), (6, 4))  # the second and third codes: the first symbol of theirs, and bits
NAMED = 21  # exponents that have a code
PIECE = 2048  # blocks that are encoded or decoded at a time in torch


class Tile(NamedTuple):
    """``warps`` decode a block."""

    warps: int = 4


class Coded(NamedTuple):
    """Weights of any shape [...], stored: the inputs of the operation."""

    mantissas: Tensor  # uint8 [...]: sign and mantissa
    first: Tensor  # int32 [ceil(N / 16)]
    escapes: Tensor  # uint8
    starts: Tensor  # int32 [ceil(N / 2048)]
    table: Tensor  # uint8 [21], the exponents of the symbols

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.numel() * part.element_size() for part in self)


def encode(weight: Tensor) -> Coded:
    """``weight``, bfloat16 of any shape, stored."""
    bits = weight.contiguous().view(torch.int16).flatten()
    exponents = (bits >> 7).to(torch.uint8)
    mantissas = (bits & 0x7F | bits >> 8 & 0x80).to(torch.uint8)
    table = torch.bincount(exponents, minlength=256).argsort(descending=True, stable=True)[:NAMED].to(torch.uint8)
    symbols = torch.full((256,), NAMED, dtype=torch.uint8, device=weight.device)
    symbols[table.long()] = torch.arange(NAMED, dtype=torch.uint8, device=weight.device)
    parts = [_encoded(piece, symbols) for piece in exponents.split(PIECE * BLOCK)]
    first, escapes, sizes = (torch.cat(part) for part in zip(*parts, strict=True))
    starts = (sizes.cumsum(0) - sizes).to(torch.int32)
    return Coded(mantissas.view(weight.shape), first, escapes, starts, table)


def _encoded(exponents: Tensor, symbols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Words of first codes, bytes of escapes, and how many of these each block has."""
    symbol = symbols[exponents.int()]
    codes, place = symbol.clamp(max=END), (symbol >= END).nonzero().squeeze(1)
    levels = []
    for base, bits in DEEPER:
        left = symbol[place] - base
        last = (1 << bits) - 1
        levels.append((place // BLOCK, left.clamp(max=last), bits))
        place = place[left >= last]
    levels.append((place // BLOCK, exponents[place], 8))
    blocks = ceil_div(len(exponents), BLOCK)
    sizes = torch.stack([_bytes(block, blocks, bits) for block, _, bits in levels]).sum(0)
    starts, total = sizes.cumsum(0) - sizes, int(sizes.sum())
    escapes = torch.zeros(total, dtype=torch.uint8, device=exponents.device)
    for block, values, bits in levels:
        slots = torch.zeros(total * 8 // bits, dtype=torch.uint8, device=exponents.device)
        slots[_slots(block, starts, bits)] = values
        escapes |= _packed(slots, bits)
        starts = starts + _bytes(block, blocks, bits)
    words = torch.nn.functional.pad(codes, (0, -len(codes) % WORD))
    return _packed(words, SHORT).view(torch.int32), escapes, sizes


def _bytes(block: Tensor, blocks: int, bits: int) -> Tensor:
    """Bytes [blocks] that codes take; ``block`` of each code."""
    return (torch.bincount(block, minlength=blocks) * bits + 7) // 8


def _slots(block: Tensor, starts: Tensor, bits: int) -> Tensor:
    """The place of each code, counted in codes of ``bits``, where those of a block lie from byte ``starts`` on."""
    counts = torch.bincount(block, minlength=len(starts))
    shift = starts * (8 // bits) - (counts.cumsum(0) - counts)
    return torch.arange(len(block), device=block.device) + shift[block]


def _packed(codes: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    return (codes.view(-1, 8 // bits) << shifts).sum(1, dtype=torch.uint8)


def reference(mantissas: Tensor, first: Tensor, escapes: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """The weights, bfloat16 of the shape of ``mantissas``."""
    lows, words = mantissas.flatten().split(PIECE * BLOCK), first.split(PIECE * BLOCK // WORD)
    pieces = zip(lows, words, starts.split(PIECE), strict=True)
    return torch.cat([_decoded(*piece, escapes, table) for piece in pieces]).view(mantissas.shape)


def _decoded(mantissas: Tensor, first: Tensor, starts: Tensor, escapes: Tensor, table: Tensor) -> Tensor:
    shifts = torch.arange(0, 8, SHORT, dtype=torch.uint8, device=first.device)
    symbol = (first.view(torch.uint8)[:, None] >> shifts & END).flatten()[: len(mantissas)]
    place, starts = (symbol == END).nonzero().squeeze(1), starts.long()
    for base, bits in DEEPER:
        code = _codes(escapes, place // BLOCK, starts, bits)
        symbol[place] = base + code
        starts = starts + _bytes(place // BLOCK, len(starts), bits)
        place = place[code == (1 << bits) - 1]
    known = torch.cat([table, table.new_zeros(1)])
    exponents = known[symbol.int()]
    exponents[place] = _codes(escapes, place // BLOCK, starts, 8)
    low = mantissas.to(torch.int16)
    return ((low & 0x80) << 8 | exponents.to(torch.int16) << 7 | low & 0x7F).view(torch.bfloat16)


def _codes(escapes: Tensor, block: Tensor, starts: Tensor, bits: int) -> Tensor:
    slots = _slots(block, starts, bits)
    return escapes[slots * bits // 8] >> (slots * bits % 8).to(torch.uint8) & ((1 << bits) - 1)


@jit
def _before(escaped):
    """How many of [ROWS, 16] come before each, and how many there are."""
    ones = escaped.to(tl.int32)
    rows = tl.sum(ones, 1)
    return (tl.cumsum(rows, 0) - rows)[:, None] + tl.cumsum(ones, 1) - ones, tl.sum(rows, 0)


@jit
def _deeper(escapes, start, symbol, escaped, BASE: tl.constexpr, BITS: tl.constexpr):
    """Symbols with the next codes of those ``escaped``, who of them escapes again, and where their codes start."""
    rank, count = _before(escaped)
    byte = tl.load(escapes + start + rank * BITS // 8, mask=escaped, other=0).to(tl.int32)
    code = byte >> (rank * BITS % 8) & ((1 << BITS) - 1)
    again = escaped & (code == (1 << BITS) - 1)
    return tl.where(escaped, BASE + code, symbol), again, start + (count * BITS + 7) // 8


@jit
def _bf16_codec(mantissas, first, escapes, starts, table, y, n, words, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    row = block.to(tl.int64) * (BLOCK // 16) + tl.arange(0, BLOCK // 16)
    column = tl.arange(0, 16)
    place = row[:, None] * 16 + column[None, :]
    inside = place < n
    start = tl.load(starts + block)
    word = tl.load(first + row, mask=row < words, other=0)
    low = tl.load(mantissas + place, mask=inside, other=0).to(tl.int32)
    symbol = word[:, None] >> 2 * column[None, :] & 3
    symbol, escaped, start = _deeper(escapes, start, symbol, symbol == 3, 3, 2)
    symbol, escaped, start = _deeper(escapes, start, symbol, escaped, 6, 4)
    rank, _ = _before(escaped)
    known = tl.load(table + symbol, mask=escaped == 0, other=0).to(tl.int32)
    plain = tl.load(escapes + start + rank, mask=escaped, other=0).to(tl.int32)
    bits = (low & 0x80) << 8 | known + plain << 7 | low & 0x7F
    tl.store(y + place, bits.to(tl.int16), mask=inside)


def outside(mantissas: Tensor, first: Tensor, escapes: Tensor, starts: Tensor, table: Tensor) -> str | None:
    """Why the inputs are not for the kernel."""
    return first_reason([(mantissas.is_contiguous(), "the weights do not lie in order")])


def plan(
    mantissas: Tensor, first: Tensor, escapes: Tensor, starts: Tensor, table: Tensor, tile: Tile | None = None
) -> Plan:
    """One program a block."""
    y = torch.empty_like(mantissas, dtype=torch.bfloat16)
    inputs = {"mantissas": mantissas, "first": first, "escapes": escapes, "starts": starts, "table": table}
    arguments = inputs | {"y": y.view(torch.int16), "n": y.numel(), "words": first.numel()}
    warps = (tile or Tile()).warps
    return Plan(y, [Launch(_bf16_codec, (starts.numel(),), arguments, {"BLOCK": BLOCK}, warps)])


def bf16_codec(mantissas: Tensor, first: Tensor, escapes: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """The weights, as ``reference`` says."""
    return reference(mantissas, first, escapes, starts, table)


def _shaped(mantissas: Tensor, first: Tensor, escapes: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    return torch.empty_like(mantissas, dtype=torch.bfloat16)


bf16_codec = operation(bf16_codec, reference, plan, outside, _shaped)
