"""Sparse weights: which elements remain, as bits, and their values.

A matrix w [..., out, in] of which only some elements remain is ``scatter(mask, values)``. ``mask`` uint8
[..., out, ceil(in / 8)] has a bit for every element, the least significant first, zero beyond ``in``. ``values`` are
the elements whose bit is set, in row-major order: [n] for a whole matrix, [experts, n] for a stack each matrix of which
keeps n, [out, n] where every row keeps n. The leading axes of ``values`` are those of w, and what keeps a fixed number
can be made in parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp, take

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def scatter(mask: Expr, values: Expr, columns: int) -> Expr:
    """The matrix [..., out, columns] that holds ``values`` where ``mask`` has a bit set, and zero elsewhere.

    Raises OpError when the two do not go together.
    """
    return apply("scatter", [mask, values], {"columns": columns})


def as_scatter(expr: Expr) -> Expr | None:
    """The ``scatter`` that ``expr`` is, under whatever shape; None when it is none."""
    inner = expr.args[0] if expr.op == "reshape" else expr
    return inner if inner.op == "scatter" else None


def packed(kept: Tensor) -> Tensor:
    """``kept``, bool [..., columns], as a mask: uint8 [..., ceil(columns / 8)]."""
    filled = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 8))
    return (filled.unflatten(-1, (-1, 8)) << _bits(kept)).sum(-1, dtype=torch.uint8)


def unpacked(mask: Tensor, columns: int) -> Tensor:
    """The bits of ``mask``: bool [..., columns]."""
    bits = (mask.unsqueeze(-1) >> _bits(mask)) & 1
    return bits.flatten(-2)[..., :columns].bool()


def mask_width(columns: int) -> int:
    """The bytes of a row's bits."""
    return -(-columns // 8)


def _bits(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _infer(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    mask, values, columns = types[0], types[1], attrs["columns"]
    (*rows, width), (*lead, _) = mask.static_shape, values.static_shape
    if mask.dtype != torch.uint8 or width != mask_width(columns):
        raise ValueError(f"the mask of {columns} columns is u8[..., {mask_width(columns)}], not {mask}")
    if rows[: len(lead)] != lead:
        raise ValueError(f"the leading axes of values {values} are not those of the mask {mask}")
    return values.with_shape((*rows, columns))


def _compute(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    kept, values = unpacked(tensors[0], attrs["columns"]), tensors[1].contiguous()
    bits = values.view(WORDS[values.dtype.itemsize])  # moved as integers: torch moves no float8
    return bits.new_zeros(kept.shape).masked_scatter_(kept, bits).view(values.dtype)


def _take(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
    mask, values = expr.args
    if axis >= values.type.rank - 1:
        return None
    return scatter(take(mask, axis, start, stop), take(values, axis, start, stop), expr.attr("columns"))


OPS = (WeightOp("scatter", _infer, _compute, _take),)
