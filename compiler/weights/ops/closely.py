"""Conversions to a dtype that may be too narrow, which say so.

``cast_closely(x)`` is x in ``dtype``, where that changes no number by more than ``dtype`` rounds the largest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compiler.errors import OutputError
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp


def cast_closely(x: Expr, dtype: torch.dtype, of: str, remedy: str) -> Expr:
    """Convert to ``dtype``. Making it raises OutputError, which names ``of``, where a number changes by more."""
    return x if x.dtype == dtype else apply("cast_closely", [x], {"dtype": dtype, "of": of, "remedy": remedy})


def _compute(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    given, found = tensors[0].double(), tensors[0].to(attrs["dtype"])
    least = given.abs().amax() * torch.finfo(attrs["dtype"]).eps / 2 if given.numel() else 0.0
    changed = tensors[0][(found.double() - given).abs() > least]
    if changed.numel():
        cause = f"{attrs['of']} hold {changed[0]:.3g}, which {attrs['dtype']} does not ({changed.numel()} such numbers)"
        raise OutputError(cause, remedy=attrs["remedy"])
    return found


def _take(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
    """None: what is close depends on the largest number of all."""
    return None


OPS = (WeightOp("cast_closely", lambda types, attrs: types[0].with_dtype(attrs["dtype"]), _compute, _take),)
