"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 elements with one float16 scale, those in 1 with a float16 minimum.

The low nibbles of 16 bytes are the first half of a block, the high ones the second; fifth bits lie in a word of their
own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.weights.ops.gguf.layout import Block, Layout, floats, halves, joined, lanes, plain, stacked

SIZE = 32
PLACES = torch.arange(8)


def _nibbles(values: Tensor) -> Tensor:
    return stacked(values.unflatten(-1, (2, SIZE // 2)) & 15, 4)


def _fifths(values: Tensor) -> Tensor:
    """Bit 4 of 32 values as four bytes."""
    return (((values >> 4) & 1).unflatten(-1, (4, 8)) << PLACES).sum(-1).to(torch.uint8)


def _of_nibbles(data: Tensor) -> Tensor:
    return lanes(data, 4).flatten(-2)


def _of_fifths(data: Tensor) -> Tensor:
    return (((data.int().unsqueeze(-1) >> PLACES) & 1) << 4).flatten(-2)


def _pack_q4_0(block: Block) -> Tensor:
    return joined([halves(block.d), _nibbles(block.codes.int() + 8)])


def _unpack_q4_0(data: Tensor) -> Block:
    return plain(_of_nibbles(data[:, 2:]) - 8, floats(data[:, :2])[:, 0])


def _pack_q4_1(block: Block) -> Tensor:
    return joined([halves(block.d, -block.e), _nibbles(block.codes.int())])


def _unpack_q4_1(data: Tensor) -> Block:
    d, least = floats(data[:, :4]).unbind(-1)
    return plain(_of_nibbles(data[:, 4:]), d, -least)


def _pack_q5_0(block: Block) -> Tensor:
    codes = block.codes.int() + 16
    return joined([halves(block.d), _fifths(codes), _nibbles(codes)])


def _unpack_q5_0(data: Tensor) -> Block:
    return plain((_of_nibbles(data[:, 6:]) | _of_fifths(data[:, 2:6])) - 16, floats(data[:, :2])[:, 0])


def _pack_q5_1(block: Block) -> Tensor:
    codes = block.codes.int()
    return joined([halves(block.d, -block.e), _fifths(codes), _nibbles(codes)])


def _unpack_q5_1(data: Tensor) -> Block:
    d, least = floats(data[:, :4]).unbind(-1)
    return plain(_of_nibbles(data[:, 8:]) | _of_fifths(data[:, 4:8]), d, -least)


def _pack_q8_0(block: Block) -> Tensor:
    return joined([halves(block.d), block.codes.to(torch.int8).contiguous().view(torch.uint8)])


def _unpack_q8_0(data: Tensor) -> Block:
    return plain(data[:, 2:].contiguous().view(torch.int8).int(), floats(data[:, :2])[:, 0])


ONE = (1, 1)
LAYOUTS = (
    Layout("q4_0", 2, SIZE, 18, SIZE, (-8, 7), ONE, 0, False, _pack_q4_0, _unpack_q4_0),
    Layout("q4_1", 3, SIZE, 20, SIZE, (0, 15), ONE, 1, True, _pack_q4_1, _unpack_q4_1),
    Layout("q5_0", 6, SIZE, 22, SIZE, (-16, 15), ONE, 0, False, _pack_q5_0, _unpack_q5_0),
    Layout("q5_1", 7, SIZE, 24, SIZE, (0, 31), ONE, 1, True, _pack_q5_1, _unpack_q5_1),
    Layout("q8_0", 8, SIZE, 34, SIZE, (-127, 127), ONE, 0, False, _pack_q8_0, _unpack_q8_0),
)
