"""Linear map whose weight is codes of 2 to 4 bits, packed densely, with a table of values for each group of inputs.

    y = x · Wᵀ,   W[n, k] = values[n, g, code[n, k]],   g = k // (K / G)

Code k of a row lies in its words as packed_weight.py says. Of a table with bits + 1 numbers the first is the value of
code 0, and each other one is added where its bit of the code is set, the lowest first; one of 2^bits numbers has the
values themselves.

GPUs multiply with one table a row by `codebook_linear`, from a byte a code that is unpacked once; with more tables, and
on CPUs, W is written out, which CPUs do once.
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .codebook_linear import Tile
from .codebook_linear import plan as looked_up
from .kept import kept
from .launch import Plan, first_reason, operation
from .packed_weight import unpacked


def reference(x: Tensor, words: Tensor, table: Tensor, bits: int) -> Tensor:
    """y [..., N] in x's dtype, summed in float32.

    x [..., K] floating point, ``words`` int32 [N, ceil(K · bits / 32)], ``table`` [N, G, numbers] floating point.
    """
    return (x.float() @ dense(words, table, bits, x.shape[-1]).mT).to(x.dtype)


def dense(words: Tensor, table: Tensor, bits: int, width: int) -> Tensor:
    """W float32 [N, width]."""
    codes = unpacked(words, bits, width).long().unflatten(-1, (table.shape[1], -1))
    return values(table, bits).gather(-1, codes).flatten(-2)


def values(table: Tensor, bits: int) -> Tensor:
    """float32 [..., 2^bits]: the value of every code."""
    table = table.float()
    if table.shape[-1] == 2**bits:
        return table
    codes = torch.arange(2**bits, device=table.device)
    each = codes >> torch.arange(bits, device=table.device)[:, None] & 1
    return table[..., :1] + table[..., 1:] @ each.float()


def outside(x: Tensor, words: Tensor, table: Tensor, bits: int) -> str | None:
    """Why the inputs are not for the kernel."""
    return first_reason(
        [
            (x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"{x.dtype} is no dtype of activations"),
            (table.shape[1] == 1, f"{table.shape[1]} tables a row"),
        ]
    )


def plan(x: Tensor, words: Tensor, table: Tensor, bits: int, tile: Tile | None = None) -> Plan:
    """Those of `codebook_linear`, with a set of tables for each row."""
    width = x.shape[-1]
    indices = kept(("indices", bits, width), lambda: unpacked(words, bits, width).contiguous()[None], words)
    return looked_up(x, indices, values(table, bits)[:, :, :, None].contiguous(), None, tile)


def table_linear(x: Tensor, words: Tensor, table: Tensor, bits: int) -> Tensor:
    """y [..., N], as ``reference`` says."""
    width = x.shape[-1]
    weight = kept((x.dtype, bits, width), lambda: dense(words, table, bits, width).to(x.dtype), words, table)
    return functional.linear(x, weight)


def _shaped(x: Tensor, words: Tensor, table: Tensor, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


table_linear = operation(table_linear, reference, plan, outside, _shaped)
