"""Elementwise operations, comparisons and reductions of ATen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from compiler.frontend.aten.shared import Complex, Handler, as_dtype, axis_of, last_axis, number
from compiler.ir.graph import Value

if TYPE_CHECKING:
    from compiler.frontend.importer import Importer

_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}
_UNARY = ("neg", "abs", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "relu", "silu")


def _unary(op: str) -> Handler:
    def handler(importer: Importer, x: Value) -> Value:
        return importer.emit(op, _floating(importer, x) if op not in ("neg", "abs") else x)

    return handler


def _floating(importer: Importer, x: Value) -> Value:
    return x if x.type.dtype.is_floating_point else importer.emit("cast", x, dtype=torch.float32)


def _binary(op: str) -> Handler:
    def handler(importer: Importer, x: Value, y: Any, *, alpha: float = 1, rounding_mode: None = None) -> Any:
        if rounding_mode is not None:
            raise importer.fail(f"a division with rounding mode `{rounding_mode}` is not in the graph's vocabulary")
        dtype = importer.out.dtype
        x = as_dtype(importer, x, dtype)
        if isinstance(y, Value):
            y = as_dtype(importer, y, dtype)
            return importer.emit(op, x, y if alpha == 1 else importer.emit("mul", y, scalar=alpha))
        scalar = number(importer, y) * alpha
        return x if scalar == _NEUTRAL.get(op) else importer.emit(op, x, scalar=scalar)

    return handler


def _mul(importer: Importer, x: Any, y: Any) -> Any:
    if not isinstance(x, Complex):
        return _binary("mul")(importer, x, y)
    if not isinstance(y, Complex):
        return Complex(_binary("mul")(importer, x.real, y), _binary("mul")(importer, x.imaginary, y))
    emit = importer.emit
    real = emit("sub", emit("mul", x.real, y.real), emit("mul", x.imaginary, y.imaginary))
    return Complex(real, emit("add", emit("mul", x.real, y.imaginary), emit("mul", x.imaginary, y.real)))


def _reversed_sub(importer: Importer, x: Value, scalar: Any, alpha: float = 1) -> Value:
    negated = importer.emit("neg", x if alpha == 1 else importer.emit("mul", x, scalar=alpha))
    return _binary("add")(importer, negated, scalar)


def _square(importer: Importer, x: Value) -> Value:
    return importer.emit("pow", x, scalar=2.0)


def _reciprocal(importer: Importer, x: Value) -> Value:
    return importer.emit("pow", x, scalar=-1.0)


def _sign(importer: Importer, x: Value) -> Value:
    above, below = (importer.emit("compare", x, scalar=0, relation=relation) for relation in ("gt", "lt"))
    one, other = (importer.emit("cast", part, dtype=x.type.dtype) for part in (above, below))
    return importer.emit("sub", one, other)


def _up(importer: Importer, x: Value) -> Value:
    """The next whole number, of numbers that int64 holds: casts cut towards zero."""
    if not x.type.dtype.is_floating_point:
        return x
    whole = importer.emit("cast", importer.emit("cast", x, dtype=torch.int64), dtype=x.type.dtype)
    return importer.emit("add", whole, importer.emit("cast", _compare("gt")(importer, x, whole), dtype=x.type.dtype))


def _norm(
    importer: Importer,
    x: Value,
    order: float = 2,
    axes: Any = None,
    keep: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Value:
    if order != 2:
        raise importer.fail(f"a norm of order {order} is not in the graph's vocabulary; of order 2 it is")
    squares = _square(importer, as_dtype(importer, x, importer.out.dtype))
    return importer.emit("sqrt", _reduction("sum")(importer, squares, axes, keep))


def _compare(relation: str) -> Handler:
    def handler(importer: Importer, x: Value, y: Any) -> Value:
        if isinstance(y, Value):
            dtype = torch.promote_types(x.type.dtype, y.type.dtype)
            return importer.emit(
                "compare", as_dtype(importer, x, dtype), as_dtype(importer, y, dtype), relation=relation
            )
        return importer.emit("compare", x, scalar=number(importer, y), relation=relation)

    return handler


def _logical(op: str) -> Handler:
    def handler(importer: Importer, *operands: Value) -> Value:
        if any(operand.type.dtype != torch.bool for operand in operands):
            raise importer.fail(f"`{op}` of integers is not in the graph's vocabulary")
        return importer.emit(op, *operands)

    return handler


def _clamp(importer: Importer, x: Value, min: float | None = None, max: float | None = None) -> Value:
    x = x if min is None else importer.emit("maximum", x, scalar=number(importer, min))
    return x if max is None else importer.emit("minimum", x, scalar=number(importer, max))


def _where(importer: Importer, condition: Value, x: Any, y: Any) -> Value:
    dtype = importer.out.dtype
    return importer.emit("where", condition, _tensor(importer, x, dtype), _tensor(importer, y, dtype))


def _tensor(importer: Importer, value: Any, dtype: torch.dtype) -> Value:
    if isinstance(value, Value):
        return as_dtype(importer, value, dtype)
    return importer.emit("full", shape=(), value=number(importer, value), dtype=dtype)


def _masked_fill(importer: Importer, x: Value, mask: Value, value: Any) -> Value:
    return _where(importer, mask, value, x)


def _index_put(
    importer: Importer, x: Value, indices: Sequence[Value | None], value: Value, accumulate: bool = False
) -> Value:
    """One number where a mask of the same shape says so."""
    mask = indices[0] if len(indices) == 1 and not accumulate else None
    if mask is not None and mask.type.dtype == torch.bool and mask.shape == x.shape and not value.type.rank:
        return _where(importer, mask, value, x)
    raise importer.fail("a write to places that only a run knows is not in the graph's vocabulary")


def _gelu(importer: Importer, x: Value, approximate: str = "none") -> Value:
    return importer.emit("gelu", x, approximate=approximate)


def _cast(importer: Importer, x: Value, *args: Any, **kwargs: Any) -> Value:
    return as_dtype(importer, x, importer.out.dtype)


def _identity(importer: Importer, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


def _dropout(importer: Importer, x: Value, probability: float, train: bool) -> Value:
    if train and probability:
        raise importer.fail("the module drops activations at random", "call .eval() on it first")
    return x


def _nothing(importer: Importer, *args: Any, **kwargs: Any) -> None:
    return None


def _reduction(op: str) -> Handler:
    def handler(
        importer: Importer, x: Value, axes: Any = None, keep: bool = False, *, dtype: torch.dtype | None = None
    ) -> Value:
        x = as_dtype(importer, x, importer.out.dtype)
        axes = range(x.type.rank) if axes is None else [axes] if isinstance(axes, int) else axes
        return importer.emit(op, x, axes=tuple(axis_of(x, axis) for axis in axes), keep=keep)

    return handler


def _softmax(importer: Importer, x: Value, axis: int, *args: Any, **kwargs: Any) -> Value:
    return importer.emit("softmax", _floating(importer, x), axis=last_axis(x, axis))


def _cumsum(importer: Importer, x: Value, axis: int, *, dtype: torch.dtype | None = None) -> Value:
    return importer.emit("cumsum", as_dtype(importer, x, importer.out.dtype), axis=last_axis(x, axis))


def _argmax(importer: Importer, x: Value, axis: int | None = None, keep: bool = False) -> Value:
    if axis is None or keep:
        raise importer.fail("argmax over all axes, or keeping its axis, is not in the graph's vocabulary")
    return importer.emit("argmax", x, axis=last_axis(x, axis))


def _topk(
    importer: Importer, x: Value, count: int, axis: int = -1, largest: bool = True, sorted: bool = True
) -> list[Value]:
    if not largest:
        raise importer.fail("the smallest elements (topk with largest=False) are not in the graph's vocabulary")
    return importer.emit_all("topk", x, count=count, axis=last_axis(x, axis))


def _argsort(importer: Importer, x: Value, axis: int = -1, descending: bool = False) -> Value:
    axis = axis_of(x, axis)
    if not isinstance(x.shape[axis], int):
        raise importer.fail("an order along an axis whose length is not known is not in the graph's vocabulary")
    x = as_dtype(importer, x, torch.int64) if x.type.dtype == torch.bool else x
    ordered = x if descending else importer.emit("neg", x)
    return importer.emit_all("topk", ordered, count=x.shape[axis], axis=last_axis(x, axis))[1]


def _max(importer: Importer, x: Value, other: Value | int | None = None, keep: bool = False) -> Value | list[Value]:
    if isinstance(other, Value):
        return _binary("maximum")(importer, x, other)
    if other is None:
        return _reduction("max")(importer, x)
    if keep:
        raise importer.fail("a maximum with its index, keeping the axis, is not in the graph's vocabulary")
    return [importer.emit("max", x, axes=(axis_of(x, other),)), _argmax(importer, x, other)]


HANDLERS: dict[str, Handler] = {
    **{name: _unary(name) for name in _UNARY},
    **{name: _binary(name) for name in ("add", "sub", "div", "pow", "minimum", "maximum")},
    **{name: _compare(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **dict.fromkeys(("contiguous", "alias", "detach", "lift_fresh_copy", "clone", "detach_", "passed"), _identity),
    **dict.fromkeys(("to", "_to_copy", "type_as", "float", "bool", "long"), _cast),
    **dict.fromkeys(("logical_and", "bitwise_and", "__and__"), _logical("logical_and")),
    **dict.fromkeys(("logical_or", "bitwise_or", "__or__"), _logical("logical_or")),
    **dict.fromkeys(("logical_not", "bitwise_not"), _logical("logical_not")),
    **dict.fromkeys(
        ("_assert_tensor_metadata", "_assert_scalar", "_is_all_true", "item", "sym_constrain_range_for_size"), _nothing
    ),
    "amax": _reduction("max"),
    "argmax": _argmax,
    "argsort": _argsort,
    "ceil": _up,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "cumsum": _cumsum,
    "dropout": _dropout,
    "gelu": _gelu,
    "index_put": _index_put,
    "masked_fill": _masked_fill,
    "max": _max,
    "mean": _reduction("mean"),
    "min": _binary("minimum"),
    "linalg_vector_norm": _norm,
    "mul": _mul,
    "reciprocal": _reciprocal,
    "rsub": _reversed_sub,
    "sign": _sign,
    "softmax": _softmax,
    "square": _square,
    "_softmax": _softmax,
    "sum": _reduction("sum"),
    "topk": _topk,
    "where": _where,
}
