"""Weights as stacks of blocks of about one bit a number, of which any first few are a weight too (BitStack).

A matrix w [out, in] is the sum over blocks of S * (U V), element by element: S holds a sign for each element, U
[out, rank] and V [rank, in] say how large it is. A block is bytes, uint8 [n]: U and V as float16, then S as bits, a row
at a time, the least significant of a byte first, set where the sign is negative and zero beyond ``in``.

``dequantize_stack(*blocks)`` has the attributes ``rows``, ``columns``, ``rank``, ``dtype`` (of values) and ``worth``:
for each block how much more than later ones it is worth reading, falling; readers with little memory go by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp
from compiler.weights.ops.sparse import mask_width, packed, unpacked

FACTOR = torch.float16


@dataclass(frozen=True)
class Block:
    """``negative`` bool [out, in], and the factors ``left`` [out, rank] and ``right`` [rank, in] in float16."""

    negative: Tensor
    left: Tensor
    right: Tensor

    def values(self) -> Tensor:
        """float32 [out, in]: what the block adds."""
        size = self.left.float() @ self.right.float()
        return torch.where(self.negative, -size, size)

    def stored(self) -> Tensor:
        """The block as bytes."""
        parts = (self.left, self.right, packed(self.negative))
        return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])


def block_bytes(rows: int, columns: int, rank: int) -> int:
    """The bytes of one block."""
    return FACTOR.itemsize * rank * (rows + columns) + rows * mask_width(columns)


def read_block(stored: Tensor, rows: int, columns: int, rank: int) -> Block:
    """The block that ``stored`` uint8 [n] is."""
    sizes = [FACTOR.itemsize * rank * rows, FACTOR.itemsize * rank * columns, rows * mask_width(columns)]
    left, right, bits = (part.clone() for part in stored.split(sizes))
    negative = unpacked(bits.view(rows, -1), columns)
    return Block(negative, left.view(FACTOR).view(rows, rank), right.view(FACTOR).view(rank, columns))


def stack(
    blocks: Sequence[Expr], shape: tuple[int, int], rank: int, worth: Sequence[float], dtype: torch.dtype
) -> Expr:
    """The weight of ``shape`` that ``blocks``, each with its ``worth``, are. Raises OpError where they do not fit."""
    rows, columns = shape
    attrs = {"rows": rows, "columns": columns, "rank": rank, "worth": tuple(worth), "dtype": dtype}
    return apply("dequantize_stack", blocks, attrs)


def _infer(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    rows, columns, rank = attrs["rows"], attrs["columns"], attrs["rank"]
    wanted = TensorType(torch.uint8, (block_bytes(rows, columns, rank),))
    if any(type != wanted for type in types) or len(types) != len(attrs["worth"]):
        raise ValueError(f"a stack [{rows}, {columns}] of rank {rank} is made of {wanted}, with a worth for each")
    return TensorType(attrs["dtype"], (rows, columns))


def _compute(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    rows, columns, rank = attrs["rows"], attrs["columns"], attrs["rank"]
    total = torch.zeros(rows, columns)
    for stored in tensors:
        total += read_block(stored, rows, columns, rank).values()
    return total.to(attrs["dtype"])


OPS = (WeightOp("dequantize_stack", _infer, _compute),)
