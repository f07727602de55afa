"""Q2_K: 256 elements of two bits in parts of 16, each with a scale and a minimum of four bits.

Bytes: 16 of scales (low nibbles) and minima (high), 64 of codes, two float16. A run of 32 bytes holds 128 codes, 32 in
each pair of bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.weights.ops.gguf.layout import Block, Layout, floats, halves, joined, lanes, stacked


def pairs(codes: Tensor) -> Tensor:
    """Codes [n, 256] of two bits as bytes [n, 64]."""
    return stacked(codes.reshape(-1, 4, 32), 2).reshape(-1, 64)


def of_pairs(data: Tensor) -> Tensor:
    return lanes(data.reshape(-1, 32), 2).reshape(-1, 256)


def _pack(block: Block) -> Tensor:
    scales = block.scale.int() | block.least.int() << 4
    return joined([scales.to(torch.uint8), pairs(block.codes.int()), halves(block.d, block.e)])


def _unpack(data: Tensor) -> Block:
    d, e = floats(data[:, 80:]).unbind(-1)
    scales = data[:, :16].int()
    return Block(of_pairs(data[:, 16:80]), scales & 15, scales >> 4, d, e)


LAYOUTS = (Layout("q2_k", 10, 256, 84, 16, (0, 3), (0, 15), 15, False, _pack, _unpack),)
