"""Stacks of integer codes whose matrices differ in width.

``dequantize_experts(codes, scale, zero_point?)`` is ``dequantize`` of stacks [experts, out, in], ``bits`` being a tuple
with the width of each matrix. All have the same groups.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp, take
from compiler.weights.ops.basic import index
from compiler.weights.ops.quant import dequantized, infer_dequantized


def experts_of_widths(parts: Sequence[Expr], widths: Sequence[int], group: int) -> Expr:
    """The stack of ``parts``, as ``dequantize`` has them, whose matrices have ``widths``; these may all be the same."""
    bits = widths[0] if len(set(widths)) == 1 else tuple(widths)
    op = "dequantize" if isinstance(bits, int) else "dequantize_experts"
    return apply(op, parts, {"bits": bits, "group": group})


def by_width(value: Expr) -> dict[int, Expr]:
    """The matrices of each width of a ``dequantize_experts``, narrow ones first: stacks, in the order of experts."""
    bits: tuple[int, ...] = value.attr("bits")
    places = {width: [i for i, own in enumerate(bits) if own == width] for width in sorted({*bits})}
    return {width: _of_width(value, width, experts) for width, experts in places.items()}


def _of_width(value: Expr, width: int, experts: Sequence[int]) -> Expr:
    parts = [index(part, 0, experts) for part in value.args]
    return apply("dequantize", parts, {"bits": width, "group": value.attr("group")})


def _infer(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    found = infer_dequantized(types, attrs)
    if len(found.shape) != 3 or found.static_shape[0] != len(attrs["bits"]):
        raise ValueError(f"{len(attrs['bits'])} widths do not go with codes {types[0]}")
    return found


def _compute(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    return dequantized(tensors, attrs)


def _take(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
    if axis != 0:
        return None
    parts = [take(part, 0, start, stop) for part in expr.args]
    return experts_of_widths(parts, expr.attr("bits")[start:stop], expr.attr("group"))


OPS = (WeightOp("dequantize_experts", _infer, _compute, _take),)
