"""Q6_K: 256 elements of six bits in parts of 16, each with a scale of eight bits.

Bytes: 128 of nibbles, 64 of upper pairs of bits, 16 of scales, one float16. A run of 64 bytes of nibbles holds 128
elements, the first half in the low ones; 32 bytes of pairs hold the same 128, 32 in each pair.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.weights.ops.gguf.layout import Block, Layout, floats, halves, joined, lanes, stacked
from compiler.weights.ops.gguf.q2_k import of_pairs, pairs


def _pack(block: Block) -> Tensor:
    codes = block.codes.int() + 32
    low = stacked((codes & 15).reshape(-1, 2, 64), 4).reshape(-1, 128)
    scales = block.scale.to(torch.int8).contiguous().view(torch.uint8)
    return joined([low, pairs(codes >> 4), scales, halves(block.d)])


def _unpack(data: Tensor) -> Block:
    low = lanes(data[:, :128].reshape(-1, 64), 4).reshape(-1, 256)
    scale = data[:, 192:208].contiguous().view(torch.int8).int()
    d = floats(data[:, 208:])[:, 0]
    codes = (low | of_pairs(data[:, 128:192]) << 4) - 32
    return Block(codes, scale, torch.zeros_like(scale), d, torch.zeros_like(d))


LAYOUTS = (Layout("q6_k", 14, 256, 210, 16, (-32, 31), (-128, 127), 0, False, _pack, _unpack),)
