"""Record what a piece of torch code does to weights, as weight expressions.

A ``TracedTensor`` has the type of a weight but no data; torch operations on it build expressions. Running other
people's checkpoint converters on traced tensors yields what they compute, for any model family, without
knowing the family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from compiler.errors import CheckpointError
from compiler.weights.expr import Expr
from compiler.weights.ops import basic

Rule = Callable[..., Any]


class TracedTensor(Tensor):
    """A tensor without data whose value is ``expr``. It behaves like a contiguous tensor on the meta device."""

    expr: Expr

    @staticmethod
    def __new__(cls: type[TracedTensor], expr: Expr) -> TracedTensor:
        return Tensor._make_wrapper_subclass(cls, expr.shape, dtype=expr.dtype, device=torch.device("meta"))

    def __init__(self, expr: Expr) -> None:
        self.expr = expr

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"TracedTensor({self.expr.type})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = _RULES.get(func.overloadpacket.__name__)
        if rule is None:
            raise CheckpointError(
                f"converting the checkpoint's tensors needs the unsupported operation {func}",
                remedy="another version of transformers may do without; or give `capture` the loaded module",
            )
        result = rule(*map(_unwrap, args), **(kwargs or {}))
        return [cls(expr) for expr in result] if isinstance(result, list) else cls(result)


def _unwrap(value: Any) -> Any:
    if isinstance(value, list):
        return [_unwrap(item) for item in cast(list[Any], value)]
    return value.expr if isinstance(value, TracedTensor) else value


def _keep(x: Expr, *_: Any, **__: Any) -> Expr:
    return x


def _to(x: Expr, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> Expr:
    return basic.cast(x, dtype or x.dtype)


def _swap(x: Expr, first: int, second: int) -> Expr:
    perm = list(range(x.type.rank))
    perm[first], perm[second] = perm[second], perm[first]
    return basic.transpose(x, perm)


def _permute(x: Expr, perm: Sequence[int]) -> Expr:
    return basic.transpose(x, [axis % x.type.rank for axis in perm])


def _split_sizes(x: Expr, sizes: Sequence[int], axis: int = 0) -> list[Expr]:
    parts: list[Expr] = []
    start = 0
    for size in sizes:
        parts.append(basic.slice(x, axis, start, start + size))
        start += size
    return parts


def _split(x: Expr, size: int, axis: int = 0) -> list[Expr]:
    length = x.shape[axis]
    return _split_sizes(x, [min(size, length - start) for start in range(0, length, size)], axis)


def _select(x: Expr, axis: int, position: int) -> Expr:
    axis %= x.type.rank
    position %= x.shape[axis]
    return _drop_axis(basic.slice(x, axis, position, position + 1), axis)


def _unbind(x: Expr, axis: int = 0) -> list[Expr]:
    return [_select(x, axis, position) for position in range(x.shape[axis])]


def _slice(x: Expr, axis: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Expr:
    indices = range(x.shape[axis])[start:stop:step]
    return basic.slice(x, axis, indices.start, indices.stop) if step == 1 else basic.index(x, axis, indices)


def _drop_axis(x: Expr, axis: int) -> Expr:
    axis %= x.type.rank
    return basic.reshape(x, (*x.shape[:axis], *x.shape[axis + 1 :])) if x.shape[axis] == 1 else x


def _add_axis(x: Expr, axis: int) -> Expr:
    axis %= x.type.rank + 1
    return basic.reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))


def _flip(x: Expr, axes: Sequence[int]) -> Expr:
    for axis in axes:
        x = basic.index(x, axis, range(x.shape[axis])[::-1])
    return x


def _cat(parts: Sequence[Expr], axis: int = 0) -> Expr:
    return basic.concat(parts, axis)


def _stack(parts: Sequence[Expr], axis: int = 0) -> Expr:
    return basic.stack(parts, axis)


def _arithmetic(op: Callable[[Expr, Expr], Expr]) -> Rule:
    def rule(x: Expr, y: Expr | float) -> Expr:
        return op(x, y if isinstance(y, Expr) else basic.full(x.shape, y, x.dtype))

    return rule


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("detach", "alias", "clone", "contiguous", "lift_fresh"), _keep),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), basic.reshape),
    "_to_copy": _to,
    "t": basic.transpose,
    "transpose": _swap,
    "permute": _permute,
    "split": _split,
    "split_with_sizes": _split_sizes,
    "select": _select,
    "unbind": _unbind,
    "slice": _slice,
    "squeeze": _drop_axis,
    "unsqueeze": _add_axis,
    "flip": _flip,
    "cat": _cat,
    "stack": _stack,
    "add": _arithmetic(basic.add),
    "sub": _arithmetic(basic.sub),
    "mul": _arithmetic(basic.mul),
    "div": _arithmetic(basic.div),
}
