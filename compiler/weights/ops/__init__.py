"""The operations that weight expressions are made of, and how a part of one is computed without the whole.

Computation happens in the dtype an expression's type says; nothing is promoted. `take` narrows an expression to a
range along one axis and pushes that range down to the reads, so that a tensor of any size can be made in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from compiler.errors import OpError
from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply

Attrs = Mapping[str, Any]
Infer = Callable[[Sequence[TensorType], Attrs], TensorType]
Compute = Callable[[Sequence[Tensor], Attrs], Tensor]
Take = Callable[[Expr, int, int, int], Expr | None]


@dataclass(frozen=True)
class WeightOp:
    """One operation on weights.

    ``infer`` gives the result's type and raises ValueError when the operands do not fit. ``compute`` makes the
    result; it may return a view of an operand, but never changes one. ``take(expr, axis, start, stop)`` rewrites
    an application of the operation to the range [start, stop) of its result along ``axis`` (an expression over
    ranges of the operands), or returns None when that needs the whole result.
    """

    name: str
    infer: Infer
    compute: Compute
    take: Take | None = None


@cache
def _table() -> dict[str, WeightOp]:
    from compiler.weights.ops import (
        basic,
        closely,
        codebook,
        expert_widths,
        fp8,
        gguf,
        minifloat,
        mx,
        nvfp4,
        quant,
        real_zeros,
        rotary,
        sparse,
        stack,
        ternary,
    )

    modules = (
        basic,
        closely,
        quant,
        expert_widths,
        real_zeros,
        ternary,
        codebook,
        minifloat,
        fp8,
        mx,
        nvfp4,
        gguf,
        rotary,
        sparse,
        stack,
    )
    return {op.name: op for module in modules for op in module.OPS}


def weight_op(name: str) -> WeightOp:
    """The operation called ``name``. Raises OpError for an unknown one."""
    if name not in _table():
        raise OpError(f"unknown weight operation `{name}`", remedy=f"known: {', '.join(_table())}")
    return _table()[name]


def take(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    """The range [start, stop) of ``expr`` along ``axis``, computed from as little of its operands as possible."""
    if (start, stop) == (0, expr.shape[axis]):
        return expr
    rule = None if expr.op == "load" else weight_op(expr.op).take
    narrowed = rule(expr, axis, start, stop) if rule else None
    return narrowed or apply("slice", [expr], {"axis": axis, "start": start, "stop": stop})


def take_elementwise(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    """The ``take`` rule of an operation whose operands broadcast against its result."""
    return apply(expr.op, [_take_broadcast(arg, expr, axis, start, stop) for arg in expr.args], dict(expr.attrs))


def take_rows(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
    """The ``take`` rule of an operation that makes each row (index of axis 0) from the same rows of its operands."""
    return take_elementwise(expr, 0, start, stop) if axis == 0 else None


def _take_broadcast(arg: Expr, result: Expr, axis: int, start: int, stop: int) -> Expr:
    own_axis = axis - (result.type.rank - arg.type.rank)
    if own_axis < 0 or arg.shape[own_axis] != result.shape[axis]:
        return arg
    return take(arg, own_axis, start, stop)
