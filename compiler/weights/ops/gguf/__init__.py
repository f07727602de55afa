"""Block formats of GGUF files as number systems: ``dequantize_gguf(blocks u8 [..., out, bytes])``, float32.

A weight is kept as the file has it, so that writing copies bytes. https://github.com/ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr
from compiler.weights.ops import Attrs, WeightOp, take_elementwise, take_rows
from compiler.weights.ops.codec import row_chunks
from compiler.weights.ops.gguf.blocks import Blocks, values_of
from compiler.weights.ops.gguf.layouts import LAYOUTS


def _check(width: int, size: int) -> int:
    """Blocks in a row. Raises ValueError when they do not divide it."""
    if width % size:
        raise ValueError(f"blocks of {size} do not divide {width} inputs")
    return width // size


def _blocks_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    layout, (*rows, width) = LAYOUTS[attrs["format"]], types[0].static_shape
    if not types[0].dtype.is_floating_point:
        raise ValueError("weights are floating-point")
    return TensorType(torch.uint8, (*rows, _check(width, layout.size) * layout.nbytes))


def _blocks_of(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    """Every row rounded to nearest."""
    weight, codec = tensors[0], Blocks(attrs["format"], search=attrs["search"])
    rows = weight.reshape(-1, weight.shape[-1])
    packed = torch.cat([codec.rounded(part.float()) for (part,) in row_chunks([rows])])
    return packed.reshape(*weight.shape[:-1], -1)


def _value_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    layout, (*rows, width) = LAYOUTS[attrs["format"]], types[0].static_shape
    if types[0].dtype != torch.uint8:
        raise ValueError("blocks are bytes")
    return TensorType(torch.float32, (*rows, _check(width, layout.nbytes) * layout.size))


def _values_of(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    layout, data = LAYOUTS[attrs["format"]], tensors[0]
    rows = data.reshape(-1, data.shape[-1])
    found = torch.cat([values_of(part, layout) for (part,) in row_chunks([rows])])
    return found.reshape(*data.shape[:-1], -1)


def _take(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
    """Rows, and matrices of a stack: each row has its own blocks."""
    if expr.type.rank == 3 and axis == 1:
        return take_elementwise(expr, axis, start, stop)
    return take_rows(expr, axis, start, stop)


OPS = (
    WeightOp("gguf_blocks", _blocks_type, _blocks_of, _take),
    WeightOp("dequantize_gguf", _value_type, _values_of, _take),
)
