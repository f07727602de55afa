"""Operations that move data or make it from nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compiler.ir.opdef import Attr, OpDef, Types
from compiler.ir.ops import axes as rules
from compiler.ir.ops.elementwise import axis_of, broadcast, need
from compiler.ir.types import Dim, TensorType, canonical_dim, dim_product, dim_sum


def _infer_reshape(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, shape = need(types[0]), attrs["shape"]
    if dim_product(x.shape) != dim_product(shape):
        raise ValueError(f"{x} does not fill the shape {list(shape)}")
    return [x.with_shape(shape)]


def _eval_reshape(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(shape)


def _infer_transpose(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, perm = need(types[0]), attrs["perm"]
    if sorted(perm) != list(range(x.rank)):
        raise ValueError(f"{list(perm)} is no order of the axes of {x}")
    return [x.with_shape(x.shape[axis] for axis in perm)]


def _eval_transpose(x: Tensor, *, perm: tuple[int, ...]) -> Tensor:
    return x.permute(perm)


def _infer_slice(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, start, stop, step = need(types[0]), attrs["start"], attrs["stop"], attrs["step"]
    axis = axis_of(x, attrs["axis"])
    size = x.shape[axis]
    if isinstance(size, int) and isinstance(stop, int) and stop > size:
        raise ValueError(f"stop {stop} is beyond the {size} elements of axis {axis}")
    kept = _steps(dim_sum((stop, canonical_dim(f"-({start})"))), step)
    return [x.with_shape((*x.shape[:axis], kept, *x.shape[axis + 1 :]))]


def _steps(length: Dim, step: int) -> Dim:
    if isinstance(length, int):
        return max(0, -(-length // step))
    return length if step == 1 else canonical_dim(f"ceiling(({length})/{step})")


def _eval_slice(x: Tensor, *, axis: int, start: int, stop: int, step: int) -> Tensor:
    index = [slice(None)] * x.dim()
    index[axis] = slice(start, stop, step)
    return x[tuple(index)]


def _infer_concat(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    parts = [need(type) for type in types]
    first = parts[0]
    axis = axis_of(first, attrs["axis"])
    for part in parts:
        if part.dtype != first.dtype or _without(part, axis) != _without(first, axis):
            raise ValueError(f"{part} and {first} do not join along axis {axis}")
    joined = dim_sum(part.shape[axis] for part in parts)
    return [first.with_shape((*first.shape[:axis], joined, *first.shape[axis + 1 :]))]


def _without(type: TensorType, axis: int) -> tuple[Dim, ...]:
    return (*type.shape[:axis], *type.shape[axis + 1 :])


def _eval_concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


def _infer_expand(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, shape = need(types[0]), attrs["shape"]
    if broadcast(x.shape, shape) != shape:
        raise ValueError(f"{x} does not expand to {list(shape)}")
    return [x.with_shape(shape)]


def _eval_expand(x: Tensor, *, shape: tuple[int, ...]) -> Tensor:
    return x.expand(shape)


def _infer_arange(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    length = dim_sum((attrs["stop"], canonical_dim(f"-({attrs['start']})")))
    return [TensorType(torch.int64, (length,))]


def _eval_arange(*, start: int, stop: int) -> Tensor:
    return torch.arange(start, stop)


def _infer_full(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    return [TensorType(attrs["dtype"], attrs["shape"])]


def _eval_full(*, shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, value, dtype=dtype)


def _infer_gather(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, index = need(types[0]), need(types[1])
    axis_of(x, attrs["axis"])
    if x.rank != index.rank:
        raise ValueError(f"{x} and indices {index} differ in rank")
    return [x.with_shape(index.shape)]


def _eval_gather(x: Tensor, index: Tensor, *, axis: int) -> Tensor:
    return x.gather(axis, index)


def _infer_take(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, index = need(types[0]), need(types[1])
    axis = axis_of(x, attrs["axis"])
    return [x.with_shape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))]


def _eval_take(x: Tensor, index: Tensor, *, axis: int) -> Tensor:
    axis = axis % x.dim()
    taken = x.index_select(axis, index.reshape(-1))
    return taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _infer_scatter(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    axis_of(need(types[0]), attrs["axis"])
    return [need(types[0])]


def _eval_scatter(x: Tensor, index: Tensor, *, axis: int, value: float) -> Tensor:
    return x.scatter(axis, index, value)


def _infer_pad(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, before, after = need(types[0]), attrs["before"], attrs["after"]
    if len(before) != x.rank or len(after) != x.rank:
        raise ValueError(f"needs a width for each of the {x.rank} axes")
    return [x.with_shape(dim_sum(dims) for dims in zip(x.shape, before, after, strict=True))]


def _eval_pad(x: Tensor, *, before: tuple[int, ...], after: tuple[int, ...], value: float) -> Tensor:
    widths = [width for pair in zip(reversed(before), reversed(after), strict=True) for width in pair]
    return F.pad(x, widths, value=value)


def _fit_shape(operands: Types, results: Types, attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {"shape": need(results[0]).shape}


def _fit_slice(operands: Types, results: Types, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Only an axis that is taken whole can have lost positions."""
    result = need(results[0])
    whole = result.shape[attrs["axis"]] == need(operands[0]).shape[attrs["axis"]]
    return {"stop": result.shape[attrs["axis"]]} if whole else {}


OPS: tuple[OpDef, ...] = (
    OpDef(
        "reshape",
        "x",
        _infer_reshape,
        _eval_reshape,
        {"shape": Attr("dims")},
        axes=rules.reshaped,
        fit=_fit_shape,
        doc="The same elements in row-major order under another shape.",
    ),
    OpDef(
        "transpose",
        "x",
        _infer_transpose,
        _eval_transpose,
        {"perm": Attr("ints")},
        axes=rules.transposed,
        doc="Axis i of the result is axis perm[i] of x.",
    ),
    OpDef(
        "slice",
        "x",
        _infer_slice,
        _eval_slice,
        {"axis": Attr("int"), "start": Attr("dim", 0), "stop": Attr("dim"), "step": Attr("int", 1)},
        axes=rules.resized,
        fit=_fit_slice,
        doc="Elements start, start+step, ... before stop along an axis.",
    ),
    OpDef(
        "concat",
        "xs*",
        _infer_concat,
        _eval_concat,
        {"axis": Attr("int")},
        axes=rules.joined,
        doc="Tensors joined along an axis.",
    ),
    OpDef(
        "expand",
        "x",
        _infer_expand,
        _eval_expand,
        {"shape": Attr("dims")},
        axes="... -> ...",
        fit=_fit_shape,
        doc="Size-1 and missing leading axes repeated to fill a shape.",
    ),
    OpDef(
        "arange",
        "",
        _infer_arange,
        _eval_arange,
        {"start": Attr("dim", 0), "stop": Attr("dim")},
        axes="-> position!",
        doc="start, start+1, ... before stop, as int64.",
    ),
    OpDef(
        "full",
        "",
        _infer_full,
        _eval_full,
        {"shape": Attr("dims"), "value": Attr("float"), "dtype": Attr("dtype", torch.float32)},
        axes=rules.constant,
        fit=_fit_shape,
        doc="A tensor of one value.",
    ),
    OpDef(
        "gather",
        "x index",
        _infer_gather,
        _eval_gather,
        {"axis": Attr("int")},
        axes=rules.resized,
        doc="x[..., index[..., i, ...], ...]: one index per result element, along an axis.",
    ),
    OpDef(
        "take",
        "x index",
        _infer_take,
        _eval_take,
        {"axis": Attr("int")},
        axes=rules.taken,
        doc="The slices of x at the given positions of an axis, which the axes of `index` replace.",
    ),
    OpDef(
        "scatter",
        "x index",
        _infer_scatter,
        _eval_scatter,
        {"axis": Attr("int"), "value": Attr("float")},
        axes=rules.resized,
        doc="x with `value` written where the indices point, along an axis.",
    ),
    OpDef(
        "pad",
        "x",
        _infer_pad,
        _eval_pad,
        {"before": Attr("ints"), "after": Attr("ints"), "value": Attr("float", 0.0)},
        axes=rules.resized,
        doc="x with so many elements of `value` before and after each axis.",
    ),
)
