"""Views, joins, indexing and constants of ATen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from compiler.frontend.aten.placed import Sample, Samples, joined
from compiler.frontend.aten.shared import Complex, Handler, as_dtype, axis_of, expanded, number, reshaped
from compiler.ir.graph import Value
from compiler.ir.types import Dim, canonical_dim

if TYPE_CHECKING:
    from compiler.frontend.importer import Importer

_VIEWS = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "_unsafe_view")
_ZEROS = ("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "zero")


def _reshape(importer: Importer, x: Value, *args: Any, **kwargs: Any) -> Value:
    return reshaped(importer, x, importer.out.shape)


def _permute(importer: Importer, x: Value, perm: Sequence[int]) -> Value:
    return importer.emit("transpose", x, perm=tuple(axis_of(x, axis) for axis in perm))


def _transpose(importer: Importer, x: Value, first: int, second: int) -> Value:
    perm = list(range(x.type.rank))
    first, second = axis_of(x, first), axis_of(x, second)
    perm[first], perm[second] = second, first
    return importer.emit("transpose", x, perm=tuple(perm))


def _matrix_transpose(importer: Importer, x: Value) -> Value:
    return x if x.type.rank < 2 else _transpose(importer, x, 0, 1)


def _slice(
    importer: Importer, x: Value, axis: int = 0, start: Dim | None = None, stop: Dim | None = None, step: int = 1
) -> Value:
    axis = axis_of(x, axis)
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
        return (
            canonical_dim(f"{size}{bound}") if bound < 0 else size if bound >= torch.iinfo(torch.int64).max else bound
        )
    return bound


def _select(importer: Importer, x: Value, axis: int, index: int) -> Value:
    axis = axis_of(x, axis)
    start = _bound(index, x.shape[axis], 0)
    stop = start + 1 if isinstance(start, int) else canonical_dim(f"{start}+1")
    row = importer.emit("slice", x, axis=axis, start=start, stop=stop)
    return importer.emit("reshape", row, shape=(*x.shape[:axis], *x.shape[axis + 1 :]))


def _unbind(importer: Importer, x: Value, axis: int = 0) -> list[Value] | Samples:
    count = x.shape[axis_of(x, axis)]
    if axis_of(x, axis) == 0 and isinstance(count, str):
        return Samples(x)
    if not isinstance(count, int):
        raise importer.fail(f"a split into {count} tensors is not in the graph's vocabulary")
    return [_select(importer, x, axis, index) for index in range(count)]


def _split_sizes(importer: Importer, x: Value, sizes: Sequence[int], axis: int = 0) -> list[Value]:
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    return [_slice(importer, x, axis, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _split(importer: Importer, x: Value, size: int, axis: int = 0) -> list[Value]:
    total = x.shape[axis_of(x, axis)]
    if not isinstance(total, int):
        raise importer.fail(f"a split of a symbolic axis of {total} is not in the graph's vocabulary")
    return [_slice(importer, x, axis, start, min(start + size, total)) for start in range(0, total, size)]


def _chunk(importer: Importer, x: Value, count: int, axis: int = 0) -> list[Value]:
    total = x.shape[axis_of(x, axis)]
    if not isinstance(total, int):
        raise importer.fail(f"a split of a symbolic axis of {total} is not in the graph's vocabulary")
    return _split(importer, x, math.ceil(total / count), axis)


def _concat(importer: Importer, parts: Sequence[Value | Sample], axis: int = 0) -> Value:
    samples = [part for part in parts if isinstance(part, Sample)]
    if samples and len(samples) == len(parts) and axis == 0:
        return joined(importer, samples)
    values = [part for part in parts if not isinstance(part, Sample)]
    kept = [as_dtype(importer, part, importer.out.dtype) for part in values if part.shape != (0,)]
    return kept[0] if len(kept) == 1 else importer.emit("concat", *kept, axis=axis_of(kept[0], axis))


def _stack(importer: Importer, parts: Sequence[Value], axis: int = 0) -> Value:
    axis = axis % (parts[0].type.rank + 1)
    shape = (*parts[0].shape[:axis], 1, *parts[0].shape[axis:])
    return importer.emit("concat", *(importer.emit("reshape", part, shape=shape) for part in parts), axis=axis)


def _expand(importer: Importer, x: Value, *args: Any, **kwargs: Any) -> Value:
    return expanded(importer, x, importer.out.shape)


def _repeat(importer: Importer, x: Value, times: Sequence[Dim]) -> Value:
    """An axis of size n, repeated m times, is [m, n] merged."""
    padded = (1,) * (len(times) - x.type.rank) + tuple(x.shape)
    split: list[Dim] = []
    wide: list[Dim] = []
    for count, size in zip(times, padded, strict=True):
        split += [size] if 1 in (count, size) else [1, size]
        wide += [size] if count == 1 else [count] if size == 1 else [count, size]
    spread = expanded(importer, reshaped(importer, x, tuple(split)), tuple(wide))
    return reshaped(importer, spread, importer.out.shape)


def _repeat_interleave(importer: Importer, x: Value, times: int, axis: int, **kwargs: Any) -> Value:
    axis = axis_of(x, axis)
    head, tail = tuple(x.shape[: axis + 1]), tuple(x.shape[axis + 1 :])
    split = importer.emit("reshape", x, shape=(*head, 1, *tail))
    wide = importer.emit("expand", split, shape=(*head, times, *tail))
    return importer.emit("reshape", wide, shape=importer.out.shape)


def _copy(importer: Importer, target: Value, source: Value, *args: Any) -> Value:
    return _expand(importer, as_dtype(importer, source, target.type.dtype))


def _pad(
    importer: Importer, x: Value, widths: Sequence[int], mode: str = "constant", value: float | None = None
) -> Value:
    if mode != "constant" or any(width < 0 for width in widths):
        raise importer.fail(f"padding by `{mode}` is not in the graph's vocabulary")
    missing = [0] * (x.type.rank - len(widths) // 2)
    before = (*missing, *reversed(widths[0::2]))
    after = (*missing, *reversed(widths[1::2]))
    return importer.emit("pad", x, before=before, after=after, value=float(value or 0.0))


def _diff(importer: Importer, x: Value, order: int = 1, axis: int = -1, prepend: Value | None = None) -> Value:
    if order != 1:
        raise importer.fail("a difference of higher order is not in the graph's vocabulary")
    axis = axis_of(x, axis)
    x = x if prepend is None else importer.emit("concat", prepend, x, axis=axis)
    size = x.shape[axis]
    return importer.emit(
        "sub",
        importer.emit("slice", x, axis=axis, start=1, stop=size),
        importer.emit("slice", x, axis=axis, start=0, stop=_bound(-1, size, 0)),
    )


def _arange(importer: Importer, *bounds: Dim, **kwargs: Any) -> Value:
    start, stop, step = (0, *bounds, 1) if len(bounds) == 1 else (*bounds, 1)[:3]
    if step != 1 or isinstance(start, float) or isinstance(stop, float):
        raise importer.fail("a range with a step or a fractional bound is not in the graph's vocabulary")
    return as_dtype(importer, importer.emit("arange", start=start, stop=stop), importer.out.dtype)


def _filled(value: float) -> Handler:
    def handler(importer: Importer, *args: Any, **kwargs: Any) -> Value:
        return importer.emit("full", shape=importer.out.shape, value=float(value), dtype=importer.out.dtype)

    return handler


def _full(importer: Importer, x: Any, value: Any, *args: Any, **kwargs: Any) -> Value:
    return _filled(number(importer, args[0] if isinstance(value, list) else value))(importer)


def _scalar_tensor(importer: Importer, value: float, **kwargs: Any) -> Value:
    return _filled(value)(importer)


def _embedding(importer: Importer, table: Value, ids: Value, *args: Any) -> Value:
    return importer.emit("embedding", table, ids)


def _gather(importer: Importer, x: Value, axis: int, index: Value, **kwargs: Any) -> Value:
    return importer.emit("gather", x, index, axis=axis_of(x, axis))


def _scatter(importer: Importer, x: Value, axis: int, index: Value, value: Any, **kwargs: Any) -> Value:
    return importer.emit("scatter", x, index, axis=axis_of(x, axis), value=number(importer, value))


def _index_select(importer: Importer, x: Value, axis: int, index: Value) -> Value:
    return importer.emit("take", x, index, axis=axis_of(x, axis))


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


def _view_as_complex(importer: Importer, x: Value) -> Complex:
    return Complex(*(_select(importer, x, -1, index) for index in range(2)))


def _view_as_real(importer: Importer, x: Complex) -> Value:
    return _stack(importer, [x.real, x.imaginary], -1)


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(_VIEWS, _reshape),
    **dict.fromkeys(_ZEROS, _filled(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), _filled(1)),
    **dict.fromkeys(("full", "full_like", "new_full", "fill"), _full),
    "arange": _arange,
    "broadcast_to": _expand,
    "cat": _concat,
    "chunk": _chunk,
    "constant_pad_nd": _pad,
    "copy": _copy,
    "diff": _diff,
    "embedding": _embedding,
    "expand": _expand,
    "expand_as": _expand,
    "gather": _gather,
    "index": _index,
    "index_select": _index_select,
    "pad": _pad,
    "permute": _permute,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "scalar_tensor": _scalar_tensor,
    "scatter": _scatter,
    "select": _select,
    "slice": _slice,
    "split": _split,
    "split_with_sizes": _split_sizes,
    "stack": _stack,
    "t": _matrix_transpose,
    "numpy_T": _matrix_transpose,
    "transpose": _transpose,
    "unbind": _unbind,
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
}
