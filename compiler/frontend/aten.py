"""The import table: what each ATen operation of an exported program is in the graph's vocabulary.

A handler gets the importer, then the operation's own arguments: tensors as values, symbolic sizes as dims. It reads
the result's type from ``importer.out`` where ATen leaves it to inference, and emits graph operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from compiler.frontend.experts import expert_operands
from compiler.ir.graph import Value
from compiler.ir.types import Dim, Shape, canonical_dim

if TYPE_CHECKING:
    from compiler.frontend.importer import Importer

Handler = Callable[..., Any]


class Complex(NamedTuple):
    """A complex tensor, which a graph holds as two real ones."""

    real: Value
    imaginary: Value


_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}


# --- elementwise ---------------------------------------------------------------------------------------------


def _unary(op: str) -> Handler:
    def handler(importer: Importer, x: Value) -> Value:
        return importer.emit(op, _floating(importer, x) if op not in ("neg", "abs", "logical_not") else x)

    return handler


def _floating(importer: Importer, x: Value) -> Value:
    return x if x.type.dtype.is_floating_point else importer.emit("cast", x, dtype=torch.float32)


def _binary(op: str) -> Handler:
    def handler(importer: Importer, x: Value, y: Any, *, alpha: float = 1, rounding_mode: None = None) -> Any:
        if rounding_mode is not None:
            raise importer.fail(f"a division with rounding mode `{rounding_mode}` is not in the graph's vocabulary")
        dtype = importer.out.dtype
        x = _as_dtype(importer, x, dtype)
        if isinstance(y, Value):
            y = _as_dtype(importer, y, dtype)
            return importer.emit(op, x, y if alpha == 1 else importer.emit("mul", y, scalar=alpha))
        scalar = _number(importer, y) * alpha
        return x if scalar == _NEUTRAL.get(op) else importer.emit(op, x, scalar=scalar)

    return handler


def _as_dtype(importer: Importer, x: Value, dtype: torch.dtype) -> Value:
    return x if x.type.dtype == dtype else importer.emit("cast", x, dtype=dtype)


def _number(importer: Importer, value: Any) -> float:
    if isinstance(value, str):
        raise importer.fail(f"arithmetic with the size {value} of an input is not in the graph's vocabulary")
    return float(value)


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


def _reciprocal(importer: Importer, x: Value) -> Value:
    return importer.emit("pow", x, scalar=-1.0)


def _compare(relation: str) -> Handler:
    def handler(importer: Importer, x: Value, y: Any) -> Value:
        if isinstance(y, Value):
            dtype = torch.promote_types(x.type.dtype, y.type.dtype)
            return importer.emit(
                "compare", _as_dtype(importer, x, dtype), _as_dtype(importer, y, dtype), relation=relation
            )
        return importer.emit("compare", x, scalar=_number(importer, y), relation=relation)

    return handler


def _logical(op: str) -> Handler:
    def handler(importer: Importer, *operands: Value) -> Value:
        if any(operand.type.dtype != torch.bool for operand in operands):
            raise importer.fail(f"`{op}` of integers is not in the graph's vocabulary")
        return importer.emit(op, *operands)

    return handler


def _clamp(importer: Importer, x: Value, min: float | None = None, max: float | None = None) -> Value:
    x = x if min is None else importer.emit("maximum", x, scalar=_number(importer, min))
    return x if max is None else importer.emit("minimum", x, scalar=_number(importer, max))


def _where(importer: Importer, condition: Value, x: Any, y: Any) -> Value:
    dtype = importer.out.dtype
    return importer.emit("where", condition, _tensor(importer, x, dtype), _tensor(importer, y, dtype))


def _tensor(importer: Importer, value: Any, dtype: torch.dtype) -> Value:
    if isinstance(value, Value):
        return _as_dtype(importer, value, dtype)
    return importer.emit("full", shape=(), value=_number(importer, value), dtype=dtype)


def _masked_fill(importer: Importer, x: Value, mask: Value, value: Any) -> Value:
    return _where(importer, mask, value, x)


def _gelu(importer: Importer, x: Value, approximate: str = "none") -> Value:
    return importer.emit("gelu", x, approximate=approximate)


def _cast(importer: Importer, x: Value, *args: Any, **kwargs: Any) -> Value:
    return _as_dtype(importer, x, importer.out.dtype)


def _identity(importer: Importer, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


def _dropout(importer: Importer, x: Value, probability: float, train: bool) -> Value:
    if train and probability:
        raise importer.fail("the module drops activations at random", "call .eval() on it first")
    return x


def _nothing(importer: Importer, *args: Any, **kwargs: Any) -> None:
    return None


# --- reductions ----------------------------------------------------------------------------------------------


def _reduction(op: str) -> Handler:
    def handler(
        importer: Importer, x: Value, axes: Any = None, keep: bool = False, *, dtype: torch.dtype | None = None
    ) -> Value:
        x = _as_dtype(importer, x, importer.out.dtype)
        axes = range(x.type.rank) if axes is None else [axes] if isinstance(axes, int) else axes
        return importer.emit(op, x, axes=tuple(_axis(x, axis) for axis in axes), keep=keep)

    return handler


def _axis(x: Value, axis: int) -> int:
    return axis % max(1, x.type.rank)


def _softmax(importer: Importer, x: Value, axis: int, *args: Any, **kwargs: Any) -> Value:
    return importer.emit("softmax", _floating(importer, x), axis=_last(x, axis))


def _last(x: Value, axis: int) -> int:
    """An axis, written -1 when it is the last."""
    return -1 if _axis(x, axis) == x.type.rank - 1 else _axis(x, axis)


def _cumsum(importer: Importer, x: Value, axis: int, *, dtype: torch.dtype | None = None) -> Value:
    return importer.emit("cumsum", _as_dtype(importer, x, importer.out.dtype), axis=_last(x, axis))


def _argmax(importer: Importer, x: Value, axis: int | None = None, keep: bool = False) -> Value:
    if axis is None or keep:
        raise importer.fail("argmax over all axes, or keeping its axis, is not in the graph's vocabulary")
    return importer.emit("argmax", x, axis=_last(x, axis))


def _topk(
    importer: Importer, x: Value, count: int, axis: int = -1, largest: bool = True, sorted: bool = True
) -> list[Value]:
    if not largest:
        raise importer.fail("the smallest elements (topk with largest=False) are not in the graph's vocabulary")
    return importer.emit_all("topk", x, count=count, axis=_last(x, axis))


def _max(importer: Importer, x: Value, *args: Any) -> Value | list[Value]:
    if len(args) == 1 and isinstance(args[0], Value):
        return _binary("maximum")(importer, x, args[0])
    if not args:
        return _reduction("max")(importer, x)
    if len(args) > 1 and args[1]:
        raise importer.fail("a maximum with its index, keeping the axis, is not in the graph's vocabulary")
    return [importer.emit("max", x, axes=(_axis(x, args[0]),)), _argmax(importer, x, args[0])]


# --- shapes --------------------------------------------------------------------------------------------------


def _reshape(importer: Importer, x: Value, *args: Any, **kwargs: Any) -> Value:
    return _reshaped(importer, x, importer.out.shape)


def _permute(importer: Importer, x: Value, perm: Sequence[int]) -> Value:
    return importer.emit("transpose", x, perm=tuple(_axis(x, axis) for axis in perm))


def _transpose(importer: Importer, x: Value, first: int, second: int) -> Value:
    perm = list(range(x.type.rank))
    first, second = _axis(x, first), _axis(x, second)
    perm[first], perm[second] = second, first
    return importer.emit("transpose", x, perm=tuple(perm))


def _matrix_transpose(importer: Importer, x: Value) -> Value:
    return x if x.type.rank < 2 else _transpose(importer, x, 0, 1)


def _slice(
    importer: Importer, x: Value, axis: int = 0, start: Dim | None = None, stop: Dim | None = None, step: int = 1
) -> Value:
    axis = _axis(x, axis)
    size = x.shape[axis]
    start, stop = _bound(start, size, 0), _bound(stop, size, size)
    if start == 0 and stop == size and step == 1:
        return x
    return importer.emit("slice", x, axis=axis, start=start, stop=stop, step=step)


def _bound(bound: Dim | None, size: Dim, default: Dim) -> Dim:
    if bound is None:
        return default
    if isinstance(bound, int) and isinstance(size, int):
        return max(0, bound + size) if bound < 0 else min(bound, size)
    if isinstance(bound, int):
        return canonical_dim(f"{size}{bound}") if bound < 0 else size if bound >= torch.iinfo(torch.int64).max else bound
    return bound


def _select(importer: Importer, x: Value, axis: int, index: int) -> Value:
    axis = _axis(x, axis)
    start = _bound(index, x.shape[axis], 0)
    stop = start + 1 if isinstance(start, int) else canonical_dim(f"{start}+1")
    row = importer.emit("slice", x, axis=axis, start=start, stop=stop)
    return importer.emit("reshape", row, shape=(*x.shape[:axis], *x.shape[axis + 1 :]))


def _unbind(importer: Importer, x: Value, axis: int = 0) -> list[Value]:
    count = x.shape[_axis(x, axis)]
    if not isinstance(count, int):
        raise importer.fail(f"a split into {count} tensors is not in the graph's vocabulary")
    return [_select(importer, x, axis, index) for index in range(count)]


def _split_sizes(importer: Importer, x: Value, sizes: Sequence[int], axis: int = 0) -> list[Value]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [_slice(importer, x, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _split(importer: Importer, x: Value, size: int, axis: int = 0) -> list[Value]:
    total = x.shape[_axis(x, axis)]
    if not isinstance(total, int):
        raise importer.fail(f"a split of a symbolic axis of {total} is not in the graph's vocabulary")
    return [_slice(importer, x, axis, start, min(start + size, total)) for start in range(0, total, size)]


def _chunk(importer: Importer, x: Value, count: int, axis: int = 0) -> list[Value]:
    total = x.shape[_axis(x, axis)]
    if not isinstance(total, int):
        raise importer.fail(f"a split of a symbolic axis of {total} is not in the graph's vocabulary")
    return _split(importer, x, math.ceil(total / count), axis)


def _concat(importer: Importer, parts: Sequence[Value], axis: int = 0) -> Value:
    kept = [_as_dtype(importer, part, importer.out.dtype) for part in parts if part.shape != (0,)]
    return kept[0] if len(kept) == 1 else importer.emit("concat", *kept, axis=_axis(kept[0], axis))


def _stack(importer: Importer, parts: Sequence[Value], axis: int = 0) -> Value:
    axis = axis % (parts[0].type.rank + 1)
    shape = (*parts[0].shape[:axis], 1, *parts[0].shape[axis:])
    return importer.emit("concat", *(importer.emit("reshape", part, shape=shape) for part in parts), axis=axis)


def _expand(importer: Importer, x: Value, *args: Any, **kwargs: Any) -> Value:
    return _expanded(importer, x, importer.out.shape)


def _repeat(importer: Importer, x: Value, times: Sequence[Dim]) -> Value:
    """An axis of size n, repeated m times, is [m, n] merged."""
    padded = (1,) * (len(times) - x.type.rank) + tuple(x.shape)
    split: list[Dim] = []
    wide: list[Dim] = []
    for count, size in zip(times, padded, strict=True):
        split += [size] if 1 in (count, size) else [1, size]
        wide += [size] if count == 1 else [count] if size == 1 else [count, size]
    spread = _expanded(importer, _reshaped(importer, x, tuple(split)), tuple(wide))
    return _reshaped(importer, spread, importer.out.shape)


def _reshaped(importer: Importer, x: Value, shape: Shape) -> Value:
    return x if x.shape == shape else importer.emit("reshape", x, shape=shape)


def _expanded(importer: Importer, x: Value, shape: Shape) -> Value:
    return x if x.shape == shape else importer.emit("expand", x, shape=shape)


def _repeat_interleave(importer: Importer, x: Value, times: int, axis: int, **kwargs: Any) -> Value:
    axis = _axis(x, axis)
    head, tail = tuple(x.shape[: axis + 1]), tuple(x.shape[axis + 1 :])
    split = importer.emit("reshape", x, shape=(*head, 1, *tail))
    wide = importer.emit("expand", split, shape=(*head, times, *tail))
    return importer.emit("reshape", wide, shape=importer.out.shape)


def _copy(importer: Importer, target: Value, source: Value, *args: Any) -> Value:
    return _expand(importer, _as_dtype(importer, source, target.type.dtype))


def _pad(importer: Importer, x: Value, widths: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    if mode != "constant" or any(width < 0 for width in widths):
        raise importer.fail(f"padding by `{mode}` is not in the graph's vocabulary")
    missing = [0] * (x.type.rank - len(widths) // 2)
    before = (*missing, *reversed(widths[0::2]))
    after = (*missing, *reversed(widths[1::2]))
    return importer.emit("pad", x, before=before, after=after, value=float(value or 0.0))


def _diff(importer: Importer, x: Value, order: int = 1, axis: int = -1, prepend: Value | None = None) -> Value:
    if order != 1:
        raise importer.fail("a difference of higher order is not in the graph's vocabulary")
    axis = _axis(x, axis)
    x = x if prepend is None else importer.emit("concat", prepend, x, axis=axis)
    size = x.shape[axis]
    return importer.emit(
        "sub",
        importer.emit("slice", x, axis=axis, start=1, stop=size),
        importer.emit("slice", x, axis=axis, start=0, stop=_bound(-1, size, 0)),
    )


# --- tensors from nothing, and indexing ----------------------------------------------------------------------


def _arange(importer: Importer, *bounds: Dim, **kwargs: Any) -> Value:
    start, stop, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    if step != 1 or isinstance(start, float) or isinstance(stop, float):
        raise importer.fail("a range with a step or a fractional bound is not in the graph's vocabulary")
    return _as_dtype(importer, importer.emit("arange", start=start, stop=stop), importer.out.dtype)


def _filled(value: float) -> Handler:
    def handler(importer: Importer, *args: Any, **kwargs: Any) -> Value:
        return importer.emit("full", shape=importer.out.shape, value=float(value), dtype=importer.out.dtype)

    return handler


def _full(importer: Importer, x: Any, value: Any, *args: Any, **kwargs: Any) -> Value:
    return _filled(_number(importer, args[0] if isinstance(value, list) else value))(importer)


def _scalar_tensor(importer: Importer, value: float, **kwargs: Any) -> Value:
    return _filled(value)(importer)


def _embedding(importer: Importer, table: Value, ids: Value, *args: Any) -> Value:
    return importer.emit("embedding", table, ids)


def _gather(importer: Importer, x: Value, axis: int, index: Value, **kwargs: Any) -> Value:
    return importer.emit("gather", x, index, axis=_axis(x, axis))


def _scatter(importer: Importer, x: Value, axis: int, index: Value, value: Any, **kwargs: Any) -> Value:
    return importer.emit("scatter", x, index, axis=_axis(x, axis), value=_number(importer, value))


def _index_select(importer: Importer, x: Value, axis: int, index: Value) -> Value:
    return importer.emit("take", x, index, axis=_axis(x, axis))


def _index(importer: Importer, x: Value, indices: Sequence[Value | None]) -> Value:
    """x[i] for one index tensor, and x[rows, columns] for a row counter and one column per row."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) == 1 and given[0][1].type.dtype != torch.bool:
        return importer.emit("take", x, given[0][1], axis=given[0][0])
    if [axis for axis, _ in given] == [0, 1] and _counts_rows(given[0][1], x) and given[1][1].type.rank == 1:
        column = importer.emit("reshape", given[1][1], shape=(x.shape[0], 1, *(1 for _ in x.shape[2:])))
        wide = importer.emit("expand", column, shape=(x.shape[0], 1, *x.shape[2:]))
        return importer.emit("reshape", importer.emit("gather", x, wide, axis=1), shape=importer.out.shape)
    raise importer.fail("indexing with these tensors is not in the graph's vocabulary")


def _counts_rows(index: Value, x: Value) -> bool:
    node = index.node
    return node is not None and node.op.name == "arange" and index.shape == (x.shape[0],) and node.attr("start") == 0


# --- whole operations ----------------------------------------------------------------------------------------


def _linear(importer: Importer, x: Value, weight: Value, bias: Value | None = None) -> Value:
    return importer.emit("linear", x, weight, bias)


def _matmul(importer: Importer, x: Value, y: Value) -> Value:
    return importer.emit("matmul", x, y)


def _addmm(importer: Importer, bias: Value, x: Value, y: Value) -> Value:
    return importer.emit("add", importer.emit("matmul", x, y), bias)


def _layer_norm(
    importer: Importer, x: Value, shape: Sequence[int], weight: Value | None = None, bias: Value | None = None,
    eps: float = 1e-5, *args: Any,
) -> Value:
    if len(shape) != 1:
        raise importer.fail("a layer norm over several axes is not in the graph's vocabulary")
    return importer.emit("layer_norm", x, weight, bias, eps=eps)


def _rms_norm(
    importer: Importer, x: Value, shape: Sequence[int], weight: Value | None = None, eps: float | None = None
) -> Value:
    if len(shape) != 1:
        raise importer.fail("an RMS norm over several axes is not in the graph's vocabulary")
    return importer.emit("rms_norm", x, weight, eps=torch.finfo(torch.float32).eps if eps is None else eps)


def _conv(
    importer: Importer, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Value:
    axes = x.type.rank - 2
    stride, dilation = _per_axis(stride, axes), _per_axis(dilation, axes)
    if padding == "same":
        raise importer.fail("a convolution with padding `same` is not in the graph's vocabulary")
    padding = _per_axis(0 if padding == "valid" else padding, axes)
    return importer.emit(
        "conv", x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups
    )


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    values = [value] if isinstance(value, int) else list(value)
    return tuple(values * axes if len(values) == 1 else values)


def _attention(
    importer: Importer, query: Value, key: Value, value: Value, mask: Value | None, bias: Value | None,
    sinks: Value | None, scale: float, causal: bool, window: int, softcap: float,
) -> Value:
    return importer.emit(
        "attention", query, key, value, mask, bias, sinks, scale=scale, causal=causal, window=window, softcap=softcap
    )


def _sdpa(
    importer: Importer, query: Value, key: Value, value: Value, mask: Value | None = None, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Value:
    width = query.shape[-1]
    if not isinstance(width, int) or query.type.rank != 4 or (mask is not None and not mask.type.dtype.is_floating_point):
        raise importer.fail("this form of scaled_dot_product_attention is not in the graph's vocabulary")
    scale = width**-0.5 if scale is None else scale
    result = importer.emit("attention", query, key, value, None, mask, None, scale=scale, causal=causal)
    return importer.emit("transpose", result, perm=(0, 2, 1, 3))


def _experts(importer: Importer, x: Value, indices: Value, weights: Value, parameters: Sequence[Value]) -> Value:
    operands, attrs = expert_operands(importer, parameters)
    return importer.emit("experts", x, indices, weights, *operands, **attrs)


# --- complex numbers -----------------------------------------------------------------------------------------


def _polar(importer: Importer, length: Value, angle: Value) -> Complex:
    parts = [importer.emit("mul", length, importer.emit(op, angle)) for op in ("cos", "sin")]
    return Complex(*parts)


def _view_as_complex(importer: Importer, x: Value) -> Complex:
    return Complex(*_unbind(importer, x, -1))


def _view_as_real(importer: Importer, x: Complex) -> Value:
    return _stack(importer, [x.real, x.imaginary], -1)


HANDLERS: dict[str, Handler] = {
    **{name: _unary(name) for name in (
        "neg", "abs", "exp", "log", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "relu", "silu")},
    **{name: _binary(name) for name in ("add", "sub", "div", "pow", "minimum", "maximum")},
    **{name: _compare(name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{name: _identity for name in ("contiguous", "alias", "detach", "lift_fresh_copy", "clone", "detach_")},
    **{name: _cast for name in ("to", "_to_copy", "type_as", "float", "bool", "long")},
    **{name: _reshape for name in ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view")},
    **{name: _filled(0) for name in ("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "zero")},
    **{name: _filled(1) for name in ("ones", "ones_like", "new_ones")},
    **{name: _full for name in ("full", "full_like", "new_full", "fill")},
    **{name: _matmul for name in ("matmul", "mm", "bmm")},
    **{name: _conv for name in ("conv1d", "conv2d", "conv3d")},
    **{name: _logical("logical_and") for name in ("logical_and", "bitwise_and", "__and__")},
    **{name: _logical("logical_or") for name in ("logical_or", "bitwise_or", "__or__")},
    **{name: _logical("logical_not") for name in ("logical_not", "bitwise_not")},
    "mul": _mul, "rsub": _reversed_sub, "reciprocal": _reciprocal, "clamp": _clamp, "where": _where,
    "clamp_min": _clamp, "masked_fill": _masked_fill, "gelu": _gelu, "dropout": _dropout,
    "_assert_tensor_metadata": _nothing, "_assert_scalar": _nothing, "sym_constrain_range_for_size": _nothing,
    "sum": _reduction("sum"), "mean": _reduction("mean"), "amax": _reduction("max"), "max": _max,
    "min": _binary("minimum"), "argmax": _argmax, "softmax": _softmax, "_softmax": _softmax, "cumsum": _cumsum,
    "topk": _topk, "permute": _permute, "transpose": _transpose, "t": _matrix_transpose, "slice": _slice,
    "select": _select, "unbind": _unbind, "split": _split, "split_with_sizes": _split_sizes, "chunk": _chunk,
    "cat": _concat, "stack": _stack, "expand": _expand, "expand_as": _expand, "repeat": _repeat,
    "repeat_interleave": _repeat_interleave, "copy": _copy, "pad": _pad, "constant_pad_nd": _pad, "diff": _diff,
    "arange": _arange, "scalar_tensor": _scalar_tensor, "embedding": _embedding, "gather": _gather,
    "scatter": _scatter, "index_select": _index_select, "index": _index, "linear": _linear, "addmm": _addmm,
    "layer_norm": _layer_norm, "rms_norm": _rms_norm, "attention": _attention, "experts": _experts,
    "scaled_dot_product_attention": _sdpa, "polar": _polar, "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
}

TAKES_COMPLEX: frozenset[str] = frozenset({"mul", "view_as_real"})
