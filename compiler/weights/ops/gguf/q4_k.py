"""Q4_K and Q5_K: 256 elements in parts of 32, each with a scale and a minimum of six bits.

Bytes: two float16, 12 of scales and minima, in Q5_K 32 of fifth bits, 128 of nibbles. A run of 32 bytes holds 64
elements, the first half in low nibbles; bit i of byte j of the fifth bits belongs to element 32 i + j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.weights.ops.gguf.layout import Block, Layout, floats, halves, joined, lanes, stacked


def _nibbles(codes: Tensor) -> Tensor:
    return stacked((codes & 15).reshape(-1, 2, 32), 4).reshape(-1, 128)


def _of_nibbles(data: Tensor) -> Tensor:
    return lanes(data.reshape(-1, 32), 4).reshape(-1, 256)


def _scales(scale: Tensor, least: Tensor) -> Tensor:
    """Six bits of the first four of each, then nibbles of the others, whose upper two bits lie above the six."""
    first = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    second = least[:, :4] | (least[:, 4:] >> 4) << 6
    third = scale[:, 4:] & 15 | (least[:, 4:] & 15) << 4
    return joined([first, second, third]).to(torch.uint8)


def _of_scales(data: Tensor) -> tuple[Tensor, Tensor]:
    first, second, third = data.int().split(4, 1)
    scale = joined([first & 63, third & 15 | (first >> 6) << 4])
    return scale, joined([second & 63, third >> 4 | (second >> 6) << 4])


def _head(block: Block) -> Tensor:
    return joined([halves(block.d, block.e), _scales(block.scale.int(), block.least.int())])


def _block(data: Tensor, codes: Tensor) -> Block:
    d, e = floats(data[:, :4]).unbind(-1)
    return Block(codes, *_of_scales(data[:, 4:16]), d, e)


def _pack_q4_k(block: Block) -> Tensor:
    return joined([_head(block), _nibbles(block.codes.int())])


def _unpack_q4_k(data: Tensor) -> Block:
    return _block(data, _of_nibbles(data[:, 16:]))


def _pack_q5_k(block: Block) -> Tensor:
    codes = block.codes.int()
    return joined([_head(block), stacked((codes >> 4).reshape(-1, 8, 32), 1), _nibbles(codes)])


def _unpack_q5_k(data: Tensor) -> Block:
    fifths = lanes(data[:, 16:48], 1).flatten(-2)
    return _block(data, _of_nibbles(data[:, 48:]) | fifths << 4)


LAYOUTS = (
    Layout("q4_k", 12, 256, 144, 32, (0, 15), (0, 63), 63, False, _pack_q4_k, _unpack_q4_k),
    Layout("q5_k", 13, 256, 176, 32, (0, 31), (0, 63), 63, False, _pack_q5_k, _unpack_q5_k),
)
