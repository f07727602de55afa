"""Axis rules that depend on ranks, sizes and attributes: a function of a node's types for each operation.

Each returns a rule in the notation of docs/graph.md. Positions that have a meaning of their own (a place in a picture,
an entry of a table) are fixed, and where an operation takes a part of an axis, before and after do not correspond.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

from compiler.ir.types import Dim, TensorType

Types = Sequence[TensorType | None]
AxisRule = Callable[[Types, Types, Mapping[str, Any]], str]


def mixed(mark: str) -> AxisRule:
    """Of an operation that mixes one axis and keeps its size; ``mark`` is ``!``, or ``~`` where positions compete."""

    def rule(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
        x = _known(operands)[0]
        names = _names(x.rank)
        names[attrs["axis"] % x.rank] += mark
        return _rule([names], [names])

    return rule


def chosen(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
    """Of `topk`: positions of x compete, those of the results are ranks."""
    x = _known(operands)[0]
    axis = attrs["axis"] % x.rank
    return _rule([_marked(_names(x.rank), {axis: "~"})], [_renamed(_names(x.rank), {axis: "rank!"})] * len(results))


def reduced(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
    """Of reductions and `argmax`: what is reduced is fixed, as zeros take part in it."""
    x = _known(operands)[0]
    gone = {axis % x.rank for axis in attrs.get("axes", (attrs.get("axis"),))}
    before = _marked(_names(x.rank), dict.fromkeys(gone, "!"))
    if attrs.get("keep", False):
        return _rule([before], [_renamed(before, {axis: f"one{axis}" for axis in gone})])
    return _rule([before], [[name for axis, name in enumerate(before) if axis not in gone]])


def transposed(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
    names = _names(len(attrs["perm"]))
    return _rule([names], [[names[axis] for axis in attrs["perm"]]])


def joined(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
    """Of `concat`."""
    parts = _known(operands)
    axis, names = attrs["axis"] % parts[0].rank, _names(parts[0].rank)
    return _rule([_renamed(names, {axis: f"part{i}!"}) for i in range(len(parts))], [_renamed(names, {axis: "whole!"})])


def resized(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
    """Of `slice`, `pad`, `gather` and `scatter`, which may change sizes, but not the order of axes.

    Axes correspond where their sizes agree, except along ``axis`` of operations that read or write positions of it.
    """
    known = _known(operands)
    x, result = known[0], _known(results)[0]
    axis = attrs["axis"] % x.rank if "axis" in attrs else None
    positions = axis is not None and (len(known) > 1 or x.shape[axis] != result.shape[axis])
    cut = {i for i in range(x.rank) if (positions and i == axis) or x.shape[i] != result.shape[i]}
    names = _names(x.rank)
    others = [_renamed(names, {i: f"index{i}!" for i in cut}) for _ in known[1:]]
    return _rule(
        [_renamed(names, {i: f"x{i}!" for i in cut}), *others], [_renamed(names, {i: f"result{i}!" for i in cut})]
    )


def taken(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
    """Of `take`: the axes of the index stand in the place of the one that it addresses."""
    x, index = _known(operands)
    axis, names, own = attrs["axis"] % x.rank, _names(x.rank), _names(index.rank, "i")
    return _rule([_renamed(names, {axis: "addressed!"}), own], [[*names[:axis], *own, *names[axis + 1 :]]])


def constant(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
    """Of `full`: every position is like any other."""
    return _rule([], [_names(_known(results)[0].rank)])


def convolved(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
    """Of `conv`: channels are groups of channels, places are fixed."""
    weight = _known(operands)[1]
    x, kernel, y = ([f"{name}{axis}!" for axis in range(weight.rank - 2)] for name in ("x", "kernel", "y"))
    groups = ["g"] if attrs["groups"] > 1 else []
    inputs = _product([*groups, *(["i"] if not groups or weight.shape[1] != 1 else [])])
    outputs = _product([*groups, *(["o"] if not groups or weight.shape[0] != attrs["groups"] else [])])
    return _rule([["b", inputs, *x], [outputs, "i", *kernel], [f"{outputs}?"]], [["b", outputs, *y]])


def reshaped(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
    """Of `reshape`: runs of axes that hold the same elements, cut into common factors where these nest."""
    before, after = _known(operands)[0].shape, _known(results)[0].shape
    start = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
    start = min(len(before), len(after)) if start is None else start
    lead = [[f"a{i}"] for i in range(start)]
    ends = (len(before), len(after))
    tails: tuple[list[list[str]], list[list[str]]] = ([], [])
    while (run := _run(before[start : ends[0]], after[start : ends[1]])) is not None:
        parts = [side[end - length : end] for side, end, length in zip((before, after), ends, run, strict=True)]
        made = _factored(*parts, prefix=f"f{ends[0]}")
        tails = (made[0] + tails[0], made[1] + tails[1])
        ends = (ends[0] - run[0], ends[1] - run[1])
    rest = ([f"x{i}!"] for i in range(start, ends[0])), ([f"y{i}!"] for i in range(start, ends[1]))
    sides = [[*lead, *own, *tail] for own, tail in zip(rest, tails, strict=True)]
    return _rule(*([[_product(axis) for axis in side]] for side in sides))


def _run(before: Sequence[Dim], after: Sequence[Dim]) -> tuple[int, int] | None:
    """How many of the last axes of both sides, all of known size, hold the same elements; the fewest there are."""
    sides = [list(accumulate(_static_tail(side), mul)) for side in (before, after)]
    common = next((size for size in sides[0] if size in sides[1]), None)
    return None if common is None else (sides[0].index(common) + 1, sides[1].index(common) + 1)


def _static_tail(dims: Sequence[Dim]) -> list[int]:
    """The sizes of the last axes, from the last one on, up to the first that is symbolic."""
    sizes: list[int] = []
    for dim in reversed(dims):
        if isinstance(dim, str):
            break
        sizes.append(dim)
    return sizes


def _factored(before: Sequence[Dim], after: Sequence[Dim], prefix: str) -> tuple[list[list[str]], list[list[str]]]:
    """The factors of each axis of two runs that hold the same elements; without a common cut all are fixed."""
    bounds = [_bounds(side) for side in (before, after)]
    strides = sorted({*bounds[0], *bounds[1]})
    nested = all(outer % inner == 0 for inner, outer in pairwise(strides))
    sides: list[list[list[str]]] = []
    for side, own in zip("xy", bounds, strict=True):
        spans = [(inner, outer) for outer, inner in pairwise(own)]
        if nested:
            sides.append([[f"{prefix}s{s}" for s in reversed(strides) if a <= s < b] for a, b in spans])
        else:
            sides.append([[f"{prefix}{side}{i}!"] for i in range(len(spans))])
    return sides[0], sides[1]


def _bounds(dims: Sequence[Dim]) -> list[int]:
    """The number of elements below each axis, the outermost first, from all to one."""
    return list(accumulate(_static_tail(dims), mul, initial=1))[::-1]


def _product(atoms: Sequence[str]) -> str:
    return atoms[0] if len(atoms) == 1 else f"({' '.join(atoms)})"


def _known(types: Types) -> list[TensorType]:
    return [type for type in types if type is not None]


def _names(rank: int, prefix: str = "a") -> list[str]:
    return [f"{prefix}{axis}" for axis in range(rank)]


def _marked(names: Sequence[str], marks: Mapping[int, str]) -> list[str]:
    return [name + marks.get(axis, "") for axis, name in enumerate(names)]


def _renamed(names: Sequence[str], others: Mapping[int, str]) -> list[str]:
    return [others.get(axis, name) for axis, name in enumerate(names)]


def _rule(operands: Sequence[Sequence[str]], results: Sequence[Sequence[str]]) -> str:
    return " -> ".join(", ".join(" ".join(axes) for axes in side) for side in (operands, results))
