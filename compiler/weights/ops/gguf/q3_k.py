"""Q3_K: 256 elements of three bits in parts of 16, each with a scale of six bits; nothing is subtracted.

Bytes: 32 of third bits, 64 of the lower two (as in Q2_K), 12 of scales, one float16. Bit i of byte j of the third bits
belongs to element 32 i + j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.weights.ops.gguf.layout import Block, Layout, floats, halves, joined, lanes, stacked
from compiler.weights.ops.gguf.q2_k import of_pairs, pairs


def _pack(block: Block) -> Tensor:
    codes = block.codes.int() + 4
    third = stacked((codes >> 2).reshape(-1, 8, 32), 1)
    return joined([third, pairs(codes & 3), _scales(block.scale.int() + 32), halves(block.d)])


def _scales(scale: Tensor) -> Tensor:
    """16 scales of six bits: low nibbles of the first and the last eight, then the upper two bits, four a byte."""
    low = stacked((scale & 15).reshape(-1, 2, 8), 4)
    return joined([low, stacked((scale >> 4).reshape(-1, 4, 4), 2)])


def _unpack(data: Tensor) -> Block:
    codes = of_pairs(data[:, 32:96]) | lanes(data[:, :32], 1).flatten(-2) << 2
    scale = lanes(data[:, 96:104], 4).flatten(-2) | lanes(data[:, 104:108], 2).flatten(-2) << 4
    d = floats(data[:, 108:])[:, 0]
    return Block(codes - 4, scale - 32, torch.zeros_like(scale), d, torch.zeros_like(d))


LAYOUTS = (Layout("q3_k", 11, 256, 110, 16, (-4, 3), (-32, 31), 0, False, _pack, _unpack),)
