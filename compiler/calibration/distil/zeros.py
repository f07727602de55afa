"""Sparse weights stay sparse: which of their elements are trained, and how they are kept."""

from __future__ import annotations

from torch import Tensor

from compiler.ir.graph import Param
from compiler.pipeline import Context
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import reshape
from compiler.weights.ops.sparse import as_scatter, scatter, unpacked


def kept_of(ctx: Context, param: Param) -> Tensor | None:
    """Which elements of a sparse weight remain: bool, of its shape; None where it is dense."""
    sparse = as_scatter(param.expr)
    if sparse is None:
        return None
    return unpacked(ctx.value(sparse.args[0]), sparse.shape[-1]).reshape(param.expr.shape)


def keep(ctx: Context, param: Param, value: Tensor) -> Expr:
    """The expression of ``value`` in the place of the weight: of a sparse one, what remains."""
    sparse, kept = as_scatter(param.expr), kept_of(ctx, param)
    if sparse is None or kept is None:
        return ctx.spill(param.name, value)
    mask, before = sparse.args
    values = ctx.spill(f"{param.name}.values", value[kept].reshape(before.shape))
    return reshape(scatter(mask, values, sparse.shape[-1]), param.expr.shape)
