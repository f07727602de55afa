"""What densely packed words stand for, and how CPUs multiply by them.

    W[n, k] = (code[n, k] - zero[n, g]) · scale[n, g],   g = k // (K / G)

Code k of a row lies in the bits from k · bits on of its words, little-endian, so that 32 codes fill ``bits`` words.
Zero points lie in the same way along the columns of theirs, and are 2^(bits-1) where there are none. This is the layout
of compressed-tensors' ``pack-quantized``.

CPUs have a fast product of a few bfloat16 tokens with codes of four bits (ATen's). Tokens of other dtypes are
multiplied by codes of eight bits, widened block by block in the cache. Both forms are made once for each weight.
"""

# pyright: basic
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kept import kept

FEW_TOKENS = 64
"""Up to so many, ATen's product of four-bit codes is used for bfloat16."""
BLOCK = 1 << 18
"""Elements of a weight that are widened at a time."""
GROUPS = (256, 128, 64, 32)
"""Sizes of groups that ATen's product takes; it takes rows by 16, and here by at most ROWS."""
ROWS = 8192


def unpacked(words: Tensor, bits: int, width: int) -> Tensor:
    """Codes uint8 [rows, width] of ``words`` int32 [rows, ceil(width · bits / 32)]: 8 of them lie in ``bits`` bytes."""
    parts = -(-width // 8)
    if words.stride(-1) != 1:  # also of one word a row, which torch takes for contiguous with any stride
        words = words.clone(memory_format=torch.contiguous_format)
    octets = words.view(torch.uint8)
    octets = F.pad(octets, (0, parts * bits - octets.shape[-1])).unflatten(-1, (parts, bits))
    codes = octets.new_empty(words.shape[0], parts, 8)
    for place in range(8):
        octet, offset = divmod(place * bits, 8)
        code = octets[..., octet] >> offset
        if offset + bits > 8:
            code |= octets[..., octet + 1] << (8 - offset)
        codes[..., place] = code & (2**bits - 1)
    return codes.flatten(-2)[:, :width]


def zero_points(scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """float32 [N, G]."""
    if zeros is None:
        return torch.full_like(scales, 2 ** (bits - 1), dtype=torch.float32)
    return unpacked(zeros.mT, bits, scales.shape[0]).mT.float()


def dense(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int) -> Tensor:
    """W float32 [N, width]."""
    return _values(words, scales, zero_points(scales, zeros, bits), bits, width)


def _values(words: Tensor, scales: Tensor, zero: Tensor, bits: int, width: int) -> Tensor:
    codes = unpacked(words, bits, width).float().unflatten(-1, (scales.shape[-1], -1))
    return codes.sub_(zero[..., None]).mul_(scales.float()[..., None]).flatten(-2)


def on_cpu(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """x · Wᵀ [..., N] in x's dtype."""
    tokens = x.reshape(-1, x.shape[-1])
    if x.dtype != torch.bfloat16:
        result = prepared(Octets, words, scales, zeros, bits, x.shape[-1]).times(tokens.float()).to(x.dtype)
    elif tokens.shape[0] <= FEW_TOKENS:
        result = prepared(Nibbles, words, scales, zeros, bits, x.shape[-1]).times(tokens)
    else:
        result = _many(tokens, words, scales, zeros, bits)
    return result.reshape(*x.shape[:-1], words.shape[0])


def _many(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """x · Wᵀ [M, N] with W rounded to x's dtype, made block by block."""
    width = x.shape[-1]
    step = max(1, BLOCK // width)
    rows = zip(words.split(step), scales.split(step), zero_points(scales, zeros, bits).split(step), strict=True)
    return torch.cat([F.linear(x, _values(*each, bits, width).to(x.dtype)) for each in rows], -1)


@dataclass(frozen=True)
class Octets:
    """Codes int8 [N, K] about 0, ``scales`` float32 [N, G], and ``shift`` [N, G]: what 0 stands for, where not 0."""

    codes: Tensor
    scales: Tensor
    shift: Tensor | None

    @classmethod
    def of(cls, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int) -> Octets:
        codes = unpacked(words, bits, width).sub_(2 ** (bits - 1)).view(torch.int8)
        scales = scales.float()
        shift = None if zeros is None else (2 ** (bits - 1) - zero_points(scales, zeros, bits)) * scales
        return cls(codes, scales, shift)

    def times(self, x: Tensor) -> Tensor:
        """x · Wᵀ float32 [M, N] of x float32 [M, K]."""
        (rows, width), groups = self.codes.shape, self.scales.shape[-1]
        step = max(1, BLOCK // width)
        buffer = x.new_empty(min(step, rows), width)
        y = x.new_empty(x.shape[0], rows)
        for start in range(0, rows, step):
            codes = self.codes[start : start + step]
            weight = buffer[: len(codes)].copy_(codes)
            weight.unflatten(-1, (groups, -1)).mul_(self.scales[start : start + step, :, None])
            y[:, start : start + step] = x @ weight.mT
        return y if self.shift is None else y.addmm_(x.unflatten(-1, (groups, -1)).sum(-1), self.shift.mT)


class _Piece(NamedTuple):
    """Some rows as ATen packs them, and bfloat16 [K / group, rows, 2]: scales, and what code 8 stands for."""

    codes: Tensor
    table: Tensor


@dataclass(frozen=True)
class Nibbles:
    """Planes of four bits whose sum is W: one for up to 4 bits, two for more.

    Each of ``groups`` of columns is padded by ``padding``, and then cut into groups of ``group``.
    """

    planes: list[list[_Piece]]
    rows: int
    groups: int
    padding: int
    group: int

    @classmethod
    def of(cls, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int) -> Nibbles:
        rows, groups = scales.shape
        size = width // groups
        padding = -size % GROUPS[-1]
        group = next(each for each in GROUPS if (size + padding) % each == 0)
        codes = unpacked(words, bits, width).unflatten(-1, (groups, size))
        codes = F.pad(codes, (0, padding)).flatten(-2)
        shift = 2 ** (bits - 1) - zero_points(scales, zeros, bits)
        repeats = (size + padding) // group
        planes = [
            [_piece(codes, scale, middle, repeats) for codes, scale, middle in _by_rows(plane)]
            for plane in _planes(codes, scales.float(), shift, bits)
        ]
        return cls(planes, rows, groups, padding, group)

    def times(self, x: Tensor) -> Tensor:
        """x · Wᵀ bfloat16 [M, N] of x bfloat16 [M, K]."""
        if self.padding:
            x = F.pad(x.unflatten(-1, (self.groups, -1)), (0, self.padding)).flatten(-2)
        x = x.contiguous()
        found = [torch.cat([self._product(x, piece) for piece in plane], -1) for plane in self.planes]
        y = found[0] if len(found) == 1 else torch.stack(found).sum(0, dtype=torch.float32).to(x.dtype)
        return y[:, : self.rows]

    def _product(self, x: Tensor, piece: _Piece) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, piece.codes, self.group, piece.table)


def _by_rows(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(each.split(ROWS) for each in tensors), strict=True)


def _planes(codes: Tensor, scales: Tensor, shift: Tensor, bits: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Codes of four bits, scales and what code 8 stands for, of each plane; ``shift`` is what 2^(bits-1) stands for."""
    if bits <= 4:
        return [(codes + (8 - 2 ** (bits - 1)), scales, shift * scales)]
    # Both are about 0, so that the bfloat16 results of neither are much larger than their sum.
    coarse = (shift / 16).round()
    high = ((codes >> 4) + (8 - 2 ** (bits - 5)), scales * 16, (coarse * 16 + 8) * scales)
    return [high, (codes & 15, scales, (shift - coarse * 16) * scales)]


def _piece(codes: Tensor, scales: Tensor, middle: Tensor, repeats: int) -> _Piece:
    more = -codes.shape[0] % 16
    table = torch.stack([scales, middle], -1).to(torch.bfloat16).repeat_interleave(repeats, 1)
    table = F.pad(table, (0, 0, 0, 0, 0, more)).transpose(0, 1).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(codes, (0, 0, 0, more)).int(), 1)
    return _Piece(packed, table)


def prepared(
    form: type[Octets] | type[Nibbles], words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int
) -> Octets | Nibbles:
    """The weight in a form for CPUs, made anew only when one of the tensors was changed or exchanged."""
    others = (scales,) if zeros is None else (scales, zeros)
    return kept((form, bits, width), lambda: form.of(words, scales, zeros, bits, width), words, *others)
