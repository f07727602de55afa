"""Elementwise operations with broadcasting, and reductions.

A binary operation takes a second tensor or the attribute ``scalar``, never both. A scalar takes the dtype of the
tensor: it never promotes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compiler.ir.opdef import Attr, OpDef, Types
from compiler.ir.ops import axes as rules
from compiler.ir.types import Dim, Shape, TensorType


def need(type: TensorType | None) -> TensorType:
    """An operand that must be present."""
    if type is None:
        raise ValueError("a required operand is missing")
    return type


def broadcast(*shapes: Shape) -> Shape:
    """The shape that ``shapes`` broadcast to. Raises ValueError when they do not."""
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes]
    return tuple(_broadcast_dim(dims) for dims in zip(*padded, strict=True))


def _broadcast_dim(dims: Sequence[Dim]) -> Dim:
    sizes = {dim for dim in dims if dim != 1}
    if len(sizes) > 1:
        raise ValueError(f"sizes {', '.join(map(str, sizes))} do not broadcast")
    return sizes.pop() if sizes else 1


def axis_of(type: TensorType, axis: int) -> int:
    """``axis`` counted from the front. Raises ValueError when there is no such axis."""
    if not -type.rank <= axis < type.rank:
        raise ValueError(f"{type} has no axis {axis}")
    return axis % type.rank


# --- unary ---------------------------------------------------------------------------------------------------


def _infer_same(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    return [need(types[0])]


def _unary(name: str, function: Callable[[Tensor], Tensor], doc: str) -> OpDef:
    def evaluate(x: Tensor) -> Tensor:
        return function(x)

    return OpDef(name, "x", _infer_same, evaluate, axes="... -> ...", doc=doc)


def _eval_gelu(x: Tensor, *, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate)


def _infer_cast(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    return [need(types[0]).with_dtype(attrs["dtype"])]


def _eval_cast(x: Tensor, *, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


# --- binary --------------------------------------------------------------------------------------------------


def _binary_types(types: Types, attrs: Mapping[str, Any]) -> TensorType:
    x, y = need(types[0]), types[1]
    if (y is None) == (attrs["scalar"] is None):
        raise ValueError("takes a second operand or a scalar, and not both")
    if y is None:
        return x
    return TensorType(torch.promote_types(x.dtype, y.dtype), broadcast(x.shape, y.shape))


def _infer_binary(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    return [_binary_types(types, attrs)]


def _infer_predicate(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    return [_binary_types(types, attrs).with_dtype(torch.bool)]


def _other(x: Tensor, y: Tensor | None, scalar: float | None) -> Tensor | float:
    if y is not None:
        return y
    assert scalar is not None  # infer has checked that one of them is there
    return scalar if x.dtype.is_floating_point else int(scalar)


_SCALAR = Attr("float", None)


def _binary(name: str, function: Callable[[Tensor, Any], Tensor], doc: str) -> OpDef:
    def evaluate(x: Tensor, y: Tensor | None, *, scalar: float | None) -> Tensor:
        return function(x, _other(x, y, scalar))

    return OpDef(name, "x y?", _infer_binary, evaluate, {"scalar": _SCALAR}, axes="..., ...? -> ...", doc=doc)


def _bounded(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
    def evaluate(x: Tensor, y: Any) -> Tensor:
        return function(x, torch.as_tensor(y, dtype=x.dtype, device=x.device) if not isinstance(y, Tensor) else y)

    return evaluate


RELATIONS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
}


def _eval_compare(x: Tensor, y: Tensor | None, *, scalar: float | None, relation: str) -> Tensor:
    return RELATIONS[relation](x, _other(x, y, scalar))


def _infer_where(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    condition, x, y = need(types[0]), need(types[1]), need(types[2])
    if condition.dtype != torch.bool or x.dtype != y.dtype:
        raise ValueError("needs a bool condition and two operands of one dtype")
    return [x.with_shape(broadcast(condition.shape, x.shape, y.shape))]


# --- reductions ----------------------------------------------------------------------------------------------


def _reduced(type: TensorType, axes: Sequence[int], keep: bool) -> TensorType:
    gone = {axis_of(type, axis) for axis in axes}
    dims = [1 if axis in gone else dim for axis, dim in enumerate(type.shape)]
    return type.with_shape(dims if keep else [dim for axis, dim in enumerate(dims) if axis not in gone])


def _infer_reduction(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    return [_reduced(need(types[0]), attrs["axes"], attrs["keep"])]


def _reduction(name: str, function: Callable[..., Tensor], doc: str) -> OpDef:
    def evaluate(x: Tensor, *, axes: tuple[int, ...], keep: bool) -> Tensor:
        return function(x, axes, keepdim=keep)

    attrs = {"axes": Attr("ints"), "keep": Attr("bool", False)}
    return OpDef(name, "x", _infer_reduction, evaluate, attrs, axes=rules.reduced, doc=doc)


def _infer_argmax(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    return [_reduced(need(types[0]), (attrs["axis"],), False).with_dtype(torch.int64)]


def _eval_argmax(x: Tensor, *, axis: int) -> Tensor:
    return x.argmax(axis)


def _infer_along_axis(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    axis_of(need(types[0]), attrs["axis"])
    return [need(types[0])]


def _eval_softmax(x: Tensor, *, axis: int) -> Tensor:
    return x.softmax(axis)


def _eval_cumsum(x: Tensor, *, axis: int) -> Tensor:
    return x.cumsum(axis, dtype=x.dtype)


def _infer_topk(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x = need(types[0])
    axis = axis_of(x, attrs["axis"])
    kept = x.with_shape((*x.shape[:axis], attrs["count"], *x.shape[axis + 1 :]))
    return [kept, kept.with_dtype(torch.int64)]


def _eval_topk(x: Tensor, *, count: int, axis: int) -> tuple[Tensor, Tensor]:
    values, indices = x.topk(count, axis)
    return values, indices


OPS: tuple[OpDef, ...] = (
    _unary("neg", torch.neg, "-x."),
    _unary("abs", torch.abs, "|x|."),
    _unary("exp", torch.exp, "e^x."),
    _unary("log", torch.log, "Natural logarithm."),
    _unary("sqrt", torch.sqrt, "Square root."),
    _unary("rsqrt", torch.rsqrt, "1 / sqrt(x)."),
    _unary("sin", torch.sin, "Sine."),
    _unary("cos", torch.cos, "Cosine."),
    _unary("tanh", torch.tanh, "Hyperbolic tangent."),
    _unary("sigmoid", torch.sigmoid, "1 / (1 + e^-x)."),
    _unary("relu", torch.relu, "max(x, 0)."),
    _unary("silu", F.silu, "x * sigmoid(x)."),
    OpDef(
        "gelu",
        "x",
        _infer_same,
        _eval_gelu,
        {"approximate": Attr("text", "none", ("none", "tanh"))},
        axes="... -> ...",
        doc="x * Phi(x), exactly or by the tanh approximation.",
    ),
    _unary("logical_not", torch.logical_not, "Not x, of bools."),
    OpDef(
        "cast",
        "x",
        _infer_cast,
        _eval_cast,
        {"dtype": Attr("dtype")},
        axes="... -> ...",
        doc="x in another dtype; to an integer, rounding towards zero.",
    ),
    _binary("add", torch.add, "x + y."),
    _binary("sub", torch.sub, "x - y."),
    _binary("mul", torch.mul, "x * y."),
    _binary("div", torch.div, "x / y, of floats."),
    _binary("pow", torch.pow, "x to the power y."),
    _binary("minimum", _bounded(torch.minimum), "The smaller of x and y."),
    _binary("maximum", _bounded(torch.maximum), "The larger of x and y."),
    _binary("logical_and", torch.logical_and, "x and y, of bools."),
    _binary("logical_or", torch.logical_or, "x or y, of bools."),
    OpDef(
        "compare",
        "x y?",
        _infer_predicate,
        _eval_compare,
        {"relation": Attr("text", choices=tuple(RELATIONS)), "scalar": _SCALAR},
        axes="..., ...? -> ...",
        doc="Whether `x relation y` holds.",
    ),
    OpDef(
        "where",
        "condition x y",
        _infer_where,
        torch.where,
        axes="..., ..., ... -> ...",
        doc="x where the condition holds, y elsewhere.",
    ),
    _reduction("sum", torch.sum, "Sum over axes."),
    _reduction("mean", torch.mean, "Mean over axes."),
    _reduction("max", torch.amax, "Maximum over axes."),
    OpDef(
        "argmax",
        "x",
        _infer_argmax,
        _eval_argmax,
        {"axis": Attr("int")},
        axes=rules.reduced,
        doc="Index of the first maximum along an axis.",
    ),
    OpDef(
        "softmax",
        "x",
        _infer_along_axis,
        _eval_softmax,
        {"axis": Attr("int", -1)},
        axes=rules.mixed("~"),
        doc="e^x normalised to sum 1 along an axis.",
    ),
    OpDef(
        "cumsum",
        "x",
        _infer_along_axis,
        _eval_cumsum,
        {"axis": Attr("int", -1)},
        axes=rules.mixed("!"),
        doc="Running sum along an axis.",
    ),
    OpDef(
        "topk",
        "x",
        _infer_topk,
        _eval_topk,
        {"count": Attr("int"), "axis": Attr("int", -1)},
        axes=rules.chosen,
        doc="The `count` largest values along an axis, descending, and their indices.",
    ),
)
