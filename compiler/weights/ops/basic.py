"""Dense weight arithmetic: constants, layout, casts and linear algebra, each with a thin builder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp, take, take_elementwise

Types = Sequence[TensorType]


def full(shape: Sequence[int], value: float, dtype: torch.dtype = torch.float32) -> Expr:
    """A tensor of one value."""
    return apply("full", [], {"shape": tuple(shape), "value": value, "dtype": dtype})


def literal(values: Sequence[float], shape: Sequence[int] | None = None, dtype: torch.dtype = torch.float32) -> Expr:
    """A small tensor written out: ``values`` in row-major order, of ``shape`` (one axis by default)."""
    shape = (len(values),) if shape is None else tuple(shape)
    return apply("literal", [], {"values": tuple(values), "shape": shape, "dtype": dtype})


def eye(size: int, dtype: torch.dtype = torch.float32) -> Expr:
    """The identity matrix [size, size]."""
    return apply("eye", [], {"size": size, "dtype": dtype})


def reshape(x: Expr, shape: Sequence[int]) -> Expr:
    """The same elements in row-major order under another shape; one dim may be -1."""
    known = -math.prod(shape)
    sizes = tuple(x.type.numel // known if size == -1 and known else size for size in shape)
    if x.op == "reshape":
        x = x.args[0]
    return x if sizes == x.shape else apply("reshape", [x], {"shape": sizes})


def transpose(x: Expr, perm: Sequence[int] | None = None) -> Expr:
    """Permute axes: result axis i is axis perm[i]. Without ``perm``, swap the last two."""
    if perm is None:
        perm = (*range(x.type.rank - 2), x.type.rank - 1, x.type.rank - 2)
    if x.op == "transpose":
        x, perm = x.args[0], [x.attr("perm")[axis] for axis in perm]
    return x if tuple(perm) == tuple(range(x.type.rank)) else apply("transpose", [x], {"perm": tuple(perm)})


def slice(x: Expr, axis: int, start: int, stop: int) -> Expr:
    """The range [start, stop) along ``axis``, taken as close to the reads as the operations between allow."""
    return take(x, axis % x.type.rank, start, stop)


def index(x: Expr, axis: int, indices: Sequence[int]) -> Expr:
    """Pick ``indices`` along ``axis``: a permutation, or a selection with repeats."""
    return apply("index", [x], {"axis": axis % x.type.rank, "indices": tuple(indices)})


def concat(parts: Sequence[Expr], axis: int) -> Expr:
    """Join along ``axis``; a single part is itself."""
    return parts[0] if len(parts) == 1 else apply("concat", list(parts), {"axis": axis % parts[0].type.rank})


def stack(parts: Sequence[Expr], axis: int) -> Expr:
    """Join along a new axis."""
    shape = list(parts[0].shape)
    shape.insert(axis % (len(shape) + 1), 1)
    return concat([reshape(part, shape) for part in parts], axis % len(shape))


def cast(x: Expr, dtype: torch.dtype) -> Expr:
    """Convert to ``dtype``, rounding to nearest even."""
    return x if x.dtype == dtype else apply("cast", [x], {"dtype": dtype})


def scale(x: Expr, by: float) -> Expr:
    """Multiply by a number."""
    return x if by == 1 else apply("scale", [x], {"by": float(by)})


def add(x: Expr, y: Expr) -> Expr:
    """x + y with broadcasting; dtypes must agree."""
    return apply("add", [x, y])


def sub(x: Expr, y: Expr) -> Expr:
    """x - y with broadcasting; dtypes must agree."""
    return apply("sub", [x, y])


def mul(x: Expr, y: Expr) -> Expr:
    """x * y with broadcasting; dtypes must agree."""
    return apply("mul", [x, y])


def div(x: Expr, y: Expr) -> Expr:
    """x / y with broadcasting; dtypes must agree and be floating."""
    return apply("div", [x, y])


def matmul(x: Expr, y: Expr) -> Expr:
    """Matrix product [..., m, k] x [..., k, n]; leading axes must agree."""
    return apply("matmul", [x, y])


def pad(x: Expr, axis: int, before: int, after: int, value: float = 0.0) -> Expr:
    """Add ``before`` and ``after`` slices of ``value`` along ``axis``."""
    return apply("pad", [x], {"axis": axis % x.type.rank, "before": before, "after": after, "value": value})


def repeat(x: Expr, axis: int, times: int) -> Expr:
    """Repeat each slice along ``axis`` ``times`` in a row (a b -> a a b b)."""
    return x if times == 1 else apply("repeat", [x], {"axis": axis % x.type.rank, "times": times})


def tile(x: Expr, axis: int, times: int) -> Expr:
    """Repeat the whole along ``axis`` (a b -> a b a b)."""
    return concat([x] * times, axis)


def expand(x: Expr, shape: Sequence[int]) -> Expr:
    """Broadcast to ``shape``."""
    return x if tuple(shape) == x.shape else apply("expand", [x], {"shape": tuple(shape)})


def head_blocks(x: Expr, groups: int) -> Expr:
    """[H, d, D] to [H, groups*d, D]: head h keeps its rows in block h // (H / groups), the rest is zero."""
    return apply("head_blocks", [x], {"groups": groups})


def _need(condition: bool, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


def _replaced(shape: Sequence[int], axis: int, size: int) -> tuple[int, ...]:
    _need(0 <= axis < len(shape), f"no axis {axis}")
    return (*shape[:axis], size, *shape[axis + 1 :])


def _constant_type(types: Types, attrs: Attrs) -> TensorType:
    return TensorType(attrs["dtype"], attrs["shape"])


def _literal_type(types: Types, attrs: Attrs) -> TensorType:
    _need(len(attrs["values"]) == math.prod(attrs["shape"]), "the number of values does not fit the shape")
    return _constant_type(types, attrs)


def _literal(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    return torch.tensor(attrs["values"], dtype=torch.float64).to(attrs["dtype"]).reshape(attrs["shape"])


def _take_full(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    return full(_replaced(expr.shape, axis, stop - start), expr.attr("value"), expr.dtype)


def _reshape_type(types: Types, attrs: Attrs) -> TensorType:
    _need(math.prod(attrs["shape"]) == types[0].numel, "the number of elements differs")
    return types[0].with_shape(attrs["shape"])


def _take_reshape(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
    """A range of an axis that the reshape leaves alone, or whose leading part it splits from a coarser axis."""
    (x,) = expr.args
    outer, inner = math.prod(expr.shape[:axis]), math.prod(expr.shape[axis + 1 :])
    sizes = list(accumulate(x.shape, lambda a, b: a * b, initial=1))
    for own_axis, (before, _) in enumerate(pairwise(sizes)):
        own_inner = math.prod(x.shape[own_axis + 1 :])
        if before != outer or not expr.type.numel or (start * inner) % own_inner or (stop * inner) % own_inner:
            continue
        part = take(x, own_axis, start * inner // own_inner, stop * inner // own_inner)
        return reshape(part, _replaced(expr.shape, axis, stop - start))
    return None


def _transpose_type(types: Types, attrs: Attrs) -> TensorType:
    perm = attrs["perm"]
    _need(sorted(perm) == list(range(types[0].rank)), f"{perm} does not permute {types[0].rank} axes")
    return types[0].with_shape(types[0].shape[axis] for axis in perm)


def _take_transpose(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    perm = expr.attr("perm")
    return transpose(take(expr.args[0], perm[axis], start, stop), perm)


def _slice_type(types: Types, attrs: Attrs) -> TensorType:
    axis, start, stop, shape = attrs["axis"], attrs["start"], attrs["stop"], types[0].static_shape
    _need(0 <= axis < len(shape), f"no axis {axis}")
    _need(0 <= start <= stop <= shape[axis], f"[{start}, {stop}) is not within axis {axis}, of {shape[axis]}")
    return types[0].with_shape(_replaced(shape, axis, stop - start))


def _slice(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    return tensors[0].narrow(attrs["axis"], attrs["start"], attrs["stop"] - attrs["start"])


def _take_slice(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
    """Slices of one axis merge; of several, the first axis is cut innermost, where it makes a read shorter."""
    (x,), own_axis, own_start, own_stop = expr.args, expr.attr("axis"), expr.attr("start"), expr.attr("stop")
    if axis == own_axis:
        return take(x, axis, own_start + start, own_start + stop)
    narrowed = take(x, axis, start, stop)
    if axis > own_axis and narrowed.op == "slice" and narrowed.args[0] is x:
        return None
    return slice(narrowed, own_axis, own_start, own_stop)


def _index_type(types: Types, attrs: Attrs) -> TensorType:
    shape, axis, indices = types[0].static_shape, attrs["axis"], attrs["indices"]
    result = _replaced(shape, axis, len(indices))
    _need(all(0 <= i < shape[axis] for i in indices), f"an index is not within axis {axis}, of {shape[axis]}")
    return types[0].with_shape(result)


def _index(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    return tensors[0].index_select(attrs["axis"], torch.tensor(attrs["indices"], dtype=torch.int64))


def _take_index(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    own_axis, indices = expr.attr("axis"), expr.attr("indices")
    if axis == own_axis:
        return index(expr.args[0], axis, indices[start:stop])
    return index(take(expr.args[0], axis, start, stop), own_axis, indices)


def _concat_type(types: Types, attrs: Attrs) -> TensorType:
    axis, first = attrs["axis"], types[0]
    shapes = {_replaced(type.static_shape, axis, 0) for type in types}
    _need(len(shapes) == 1 and len({type.dtype for type in types}) == 1, "the parts do not fit together")
    return first.with_shape(_replaced(first.static_shape, axis, sum(type.static_shape[axis] for type in types)))


def _take_concat(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    own_axis = expr.attr("axis")
    if axis != own_axis:
        return concat([take(part, axis, start, stop) for part in expr.args], own_axis)
    ends = list(accumulate((part.shape[axis] for part in expr.args), initial=0))
    spans = zip(expr.args, pairwise(ends), strict=True)
    clipped = [(part, max(start, a) - a, min(stop, b) - a) for part, (a, b) in spans]
    kept = [take(part, axis, a, b) for part, a, b in clipped if a < b]
    return concat(kept, axis) if kept else take(expr.args[0], axis, 0, 0)


def _take_one(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    return apply(expr.op, [take(expr.args[0], axis, start, stop)], dict(expr.attrs))


def _scale_type(types: Types, attrs: Attrs) -> TensorType:
    _need(types[0].dtype.is_floating_point, "only floating tensors can be scaled")
    return types[0]


def _broadcast_type(types: Types, attrs: Attrs) -> TensorType:
    _need(types[0].dtype == types[1].dtype, "the dtypes differ")
    try:
        return types[0].with_shape(torch.broadcast_shapes(*(type.static_shape for type in types)))
    except RuntimeError as reason:
        raise ValueError("the shapes do not broadcast") from reason


def _quotient_type(types: Types, attrs: Attrs) -> TensorType:
    _need(types[0].dtype.is_floating_point, "only floating tensors can be divided")
    return _broadcast_type(types, attrs)


def _matmul_type(types: Types, attrs: Attrs) -> TensorType:
    left, right = types[0].static_shape, types[1].static_shape
    _need(types[0].dtype == types[1].dtype, "the dtypes differ")
    _need(len(left) == len(right) >= 2 and left[:-2] == right[:-2], "the leading axes differ")
    _need(left[-1] == right[-2], "the inner axes differ")
    return types[0].with_shape((*left[:-1], right[-1]))


def _take_matmul(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    left, right = expr.args
    if axis < expr.type.rank - 2:
        return matmul(take(left, axis, start, stop), take(right, axis, start, stop))
    if axis == expr.type.rank - 2:
        return matmul(take(left, axis, start, stop), right)
    return matmul(left, take(right, axis, start, stop))


def _pad_type(types: Types, attrs: Attrs) -> TensorType:
    shape, axis = types[0].static_shape, attrs["axis"]
    _need(attrs["before"] >= 0 and attrs["after"] >= 0, "padding is negative")
    return types[0].with_shape(_replaced(shape, axis, attrs["before"] + shape[axis] + attrs["after"]))


def _pad(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    behind = 2 * (tensors[0].dim() - 1 - attrs["axis"])
    return torch.nn.functional.pad(tensors[0], [0] * behind + [attrs["before"], attrs["after"]], value=attrs["value"])


def _take_pad(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    (x,), own_axis, before = expr.args, expr.attr("axis"), expr.attr("before")
    if axis != own_axis:
        return _take_one(expr, axis, start, stop)
    size = x.shape[axis]
    a, b = (min(max(end - before, 0), size) for end in (start, stop))
    ahead = max(0, min(stop, before) - start)
    return pad(take(x, axis, a, b), axis, ahead, stop - start - ahead - (b - a), expr.attr("value"))


def _repeat_type(types: Types, attrs: Attrs) -> TensorType:
    shape, axis = types[0].static_shape, attrs["axis"]
    return types[0].with_shape(_replaced(shape, axis, shape[axis] * attrs["times"]))


def _take_repeat(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    (x,), own_axis, times = expr.args, expr.attr("axis"), expr.attr("times")
    if axis != own_axis:
        return _take_one(expr, axis, start, stop)
    first, last = start // times, -(-stop // times)
    covering = repeat(take(x, axis, first, last), axis, times)
    start, stop = start - first * times, stop - first * times
    whole = (start, stop) == (0, covering.shape[axis])
    return covering if whole else apply("slice", [covering], {"axis": axis, "start": start, "stop": stop})


def _expand_type(types: Types, attrs: Attrs) -> TensorType:
    _need(torch.broadcast_shapes(types[0].static_shape, attrs["shape"]) == attrs["shape"], "it does not broadcast")
    return types[0].with_shape(attrs["shape"])


def _take_expand(expr: Expr, axis: int, start: int, stop: int) -> Expr:
    (x,), shape = expr.args, _replaced(expr.shape, axis, stop - start)
    own_axis = axis - (expr.type.rank - x.type.rank)
    whole = own_axis < 0 or x.shape[own_axis] != expr.shape[axis]
    return expand(x if whole else take(x, own_axis, start, stop), shape)


def _head_blocks_type(types: Types, attrs: Attrs) -> TensorType:
    heads, rows, columns = types[0].static_shape
    _need(heads % attrs["groups"] == 0, f"{heads} heads do not divide into {attrs['groups']} groups")
    return types[0].with_shape((heads, attrs["groups"] * rows, columns))


def _head_blocks(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    heads, rows, columns = tensors[0].shape
    groups = attrs["groups"]
    result = tensors[0].new_zeros(heads, groups, rows, columns)
    result[torch.arange(heads), torch.arange(heads) // (heads // groups)] = tensors[0]
    return result.reshape(heads, groups * rows, columns)


def _take_head_blocks(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
    return _take_one(expr, axis, start, stop) if axis == 2 else None


OPS: tuple[WeightOp, ...] = (
    WeightOp("full", _constant_type, lambda t, a: torch.full(a["shape"], a["value"], dtype=a["dtype"]), _take_full),
    WeightOp("literal", _literal_type, _literal),
    WeightOp(
        "eye",
        lambda t, a: TensorType(a["dtype"], (a["size"], a["size"])),
        lambda t, a: torch.eye(a["size"], dtype=a["dtype"]),
    ),
    WeightOp("reshape", _reshape_type, lambda t, a: t[0].reshape(a["shape"]), _take_reshape),
    WeightOp("transpose", _transpose_type, lambda t, a: t[0].permute(a["perm"]), _take_transpose),
    WeightOp("slice", _slice_type, _slice, _take_slice),
    WeightOp("index", _index_type, _index, _take_index),
    WeightOp("concat", _concat_type, lambda t, a: torch.cat(list(t), a["axis"]), _take_concat),
    WeightOp("cast", lambda t, a: t[0].with_dtype(a["dtype"]), lambda t, a: t[0].to(a["dtype"]), _take_one),
    WeightOp("scale", _scale_type, lambda t, a: t[0] * a["by"], _take_one),
    WeightOp("add", _broadcast_type, lambda t, a: t[0] + t[1], take_elementwise),
    WeightOp("sub", _broadcast_type, lambda t, a: t[0] - t[1], take_elementwise),
    WeightOp("mul", _broadcast_type, lambda t, a: t[0] * t[1], take_elementwise),
    WeightOp("div", _quotient_type, lambda t, a: t[0] / t[1], take_elementwise),
    WeightOp("matmul", _matmul_type, lambda t, a: t[0] @ t[1], _take_matmul),
    WeightOp("pad", _pad_type, _pad, _take_pad),
    WeightOp("repeat", _repeat_type, lambda t, a: t[0].repeat_interleave(a["times"], a["axis"]), _take_repeat),
    WeightOp("expand", _expand_type, lambda t, a: t[0].expand(a["shape"]), _take_expand),
    WeightOp("head_blocks", _head_blocks_type, _head_blocks, _take_head_blocks),
)
