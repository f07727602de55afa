"""TQ1_0 and TQ2_0: 256 elements of -1, 0 and 1 with one float16 scale.

TQ2_0 has two bits each, laid out as in Q2_K. In TQ1_0 a byte holds five digits of base 3 (of 240 elements: 48 bytes) or
four (of the last 16: 4 bytes) as a fraction of 256, rounded up: its leading digit is that of byte * 3 / 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.weights.ops.gguf.layout import Block, Layout, floats, halves, joined, plain
from compiler.weights.ops.gguf.q2_k import of_pairs, pairs

RUNS = ((0, 160, 5), (160, 240, 5), (240, 256, 4))  # elements of a run, and digits in a byte of it
DIGITS = 5


def _pack_tq2_0(block: Block) -> Tensor:
    return joined([pairs(block.codes.int() + 1), halves(block.d)])


def _unpack_tq2_0(data: Tensor) -> Block:
    return plain(of_pairs(data[:, :64]) - 1, floats(data[:, 64:])[:, 0])


def _digits(codes: Tensor, count: int) -> Tensor:
    """Runs of codes [n, count * width], digit by digit, as bytes [n, width]."""
    places = torch.tensor([3 ** (DIGITS - 1 - digit) for digit in range(count)])
    whole = (codes.unflatten(-1, (count, -1)) * places[:, None]).sum(1)
    return ((whole * 256 + 3**DIGITS - 1) // 3**DIGITS).to(torch.uint8)


def _of_digits(data: Tensor, count: int) -> Tensor:
    shifted = (data.int().unsqueeze(1) * torch.tensor([3**digit for digit in range(count)])[:, None]) & 255
    return ((shifted * 3) >> 8).flatten(1)


def _pack_tq1_0(block: Block) -> Tensor:
    codes = block.codes.int() + 1
    return joined([*(_digits(codes[:, start:stop], count) for start, stop, count in RUNS), halves(block.d)])


def _unpack_tq1_0(data: Tensor) -> Block:
    widths = [(stop - start) // count for start, stop, count in RUNS]
    *runs, scale = data.split([*widths, 2], 1)
    codes = [_of_digits(run, count) for run, (_, _, count) in zip(runs, RUNS, strict=True)]
    return plain(joined(codes) - 1, floats(scale)[:, 0])


LAYOUTS = (
    Layout("tq1_0", 34, 256, 54, 256, (-1, 1), (1, 1), 0, False, _pack_tq1_0, _unpack_tq1_0),
    Layout("tq2_0", 35, 256, 66, 256, (-1, 1), (1, 1), 0, False, _pack_tq2_0, _unpack_tq2_0),
)
