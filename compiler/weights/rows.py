"""Quantised weights whose rows are rearranged: the same rearrangement of their codes and scales."""

from __future__ import annotations

from compiler.weights.expr import Expr, apply
from compiler.weights.ops import take
from compiler.weights.ops.basic import concat, index, repeat, reshape
from compiler.weights.ops.codec import is_quantised

ROW_MOVES = ("slice", "reshape", "concat", "index")


def as_dequantize(expr: Expr) -> Expr | None:
    """``expr`` as one quantised weight, when it rearranges whole rows of some of one scheme; None when it does not."""
    if is_quantised(expr):
        return expr
    if expr.op not in ROW_MOVES:
        return None
    values = [as_dequantize(arg) for arg in expr.args]
    whole = [value for value in values if value is not None]
    if any(value.op == "dequantize_experts" for value in whole):
        return None  # which width a moved matrix has is not followed
    if len(whole) < len(values) or len({(value.op, value.attrs, len(value.args)) for value in whole}) > 1:
        return None
    columns = zip(*(value.args for value in whole), strict=True)
    parts = [_moved(expr, whole, list(column)) for column in columns]
    kept = [part for part in parts if part is not None]
    return apply(whole[0].op, kept, dict(whole[0].attrs)) if len(kept) == len(parts) else None


def _moved(expr: Expr, whole: list[Expr], parts: list[Expr]) -> Expr | None:
    """What ``expr`` does to the rows of values, done to those of their codes or scales; None when it breaks rows."""
    if all(part.shape[:-1] == value.shape[:-1] for part, value in zip(parts, whole, strict=True)):
        return _rows_moved(expr, parts, 1)
    moved = _of_matrices_moved(expr, parts) if all(part.shape[-2:] == (1, 1) for part in parts) else None
    return moved or _rows_moved(expr, parts, 2)


def _rows_moved(expr: Expr, parts: list[Expr], kept: int) -> Expr | None:
    """What ``expr`` does, done to parts whose last ``kept`` axes have to stay as they are."""
    last = expr.type.rank - kept
    match expr.op:
        case "reshape" if expr.shape[last:] == expr.args[0].shape[-kept:]:
            return reshape(parts[0], (*expr.shape[:last], *parts[0].shape[-kept:]))
        case "slice" if expr.attr("axis") < last:
            return take(parts[0], expr.attr("axis"), expr.attr("start"), expr.attr("stop"))
        case "concat" if expr.attr("axis") < last:
            return concat(parts, expr.attr("axis"))
        case "index" if expr.attr("axis") < last:
            return index(parts[0], expr.attr("axis"), expr.attr("indices"))
        case _:
            return None


def _of_matrices_moved(expr: Expr, parts: list[Expr]) -> Expr | None:
    """What ``expr`` does to rows within matrices, or across them, done to what matrices share, [..., 1, 1]."""
    rows = expr.type.rank - 2
    match expr.op:
        case "slice" | "index" if expr.attr("axis") == rows:
            return parts[0]
        case "concat" if expr.attr("axis") == rows and len(set(parts)) == 1:
            return parts[0]
        case "reshape" if rows == expr.args[0].type.rank - 2 == 1 and expr.shape[2] == expr.args[0].shape[2]:
            times, left = divmod(expr.shape[0], parts[0].shape[0])
            return repeat(parts[0], 0, times) if not left else None
        case _:
            return None
