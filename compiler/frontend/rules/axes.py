"""Positions of several axes (time, height and width of pictures) of which a text has one: all axes count alike.

Such models compute angles for every axis, [axes, B, T, pairs], and put tables together from pairs of each. Where the
axes are one row of numbers, repeated, any choice of pairs that is complete and in order is the table of one axis.
"""

from __future__ import annotations

from compiler.frontend.params import constant_values
from compiler.ir.graph import Node, Param, Value
from compiler.ir.types import Dim
from compiler.rewrite.site import Rule, Site

Picked = tuple[Value, list[int]]
"""A value [axes, ...], and which of its last axis are picked, in order, whatever the first axis."""

ALONE = ("cos", "sin", "cast")


def one_axis_of_many(site: Site) -> Value | None:
    """All of a value's last axis, picked from repetitions of it, is one of these."""
    whole = site.node.output
    found = None if _put_back(whole) else _picked(whole, whole.type.rank + 1)
    if found is None:
        return None
    many, picks = found
    shape = whole.shape
    if many is whole or many.shape[1:] != shape or picks != list(range(len(picks))):
        return None
    if len(picks) != many.shape[-1] or not _repeats(many):
        return None
    return _first(site, many)


def _put_back(value: Value) -> bool:
    """Whether a table takes the place of one of several again, from which others are picked: the last one is read."""
    users = [user for reshaped in value.users if reshaped.op.name == "reshape" for user in reshaped.output.users]
    return any(user.op.name == "concat" and user.attr("axis") == 0 for user in users)


def _picked(value: Value, rank: int) -> Picked | None:
    """Follows a value back to what all of it is picked from; None where that is not one value. Values of ``rank`` have
    the axis that repeats, the first; of others the first is another one."""
    node, width = value.node, value.shape[-1] if value.shape else None
    if node is None or not isinstance(width, int):
        return None
    last, repeats = value.type.rank - 1, value.type.rank == rank
    match node.op.name:
        case "concat" if node.attr("axis") == last or (repeats and node.attr("axis") == 0):
            parts = [_picked(part, rank) for part in node.inputs if part is not None]
            return _joined(parts, along=node.attr("axis") == last)
        case "take" if node.attr("axis") == last:
            return _rows(_picked(node.input(0), rank), node.input(1))
        case "slice" if repeats and node.attr("axis") == 0:
            return _picked(node.input(0), rank)
        case "slice" if node.attr("axis") == last:
            found = _picked(node.input(0), rank)
            taken = slice(node.attr("start"), node.attr("stop"), node.attr("step"))
            return None if found is None else (found[0], found[1][taken])
        case "reshape" if _ones_aside(node):
            return _picked(node.input(0), rank)
        case _:
            return value, list(range(width))


def _joined(parts: list[Picked | None], *, along: bool) -> Picked | None:
    """Parts of one value, joined along the last axis, or along the first, where all have to pick alike."""
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or any(part[0] is not found[0][0] for part in found):
        return None
    if along:
        return found[0][0], [pick for _, picks in found for pick in picks]
    return found[0] if all(picks == found[0][1] for _, picks in found) else None


def _rows(found: Picked | None, numbers: Value) -> Picked | None:
    rows = constant_values(numbers) if isinstance(numbers, Param) else None
    if found is None or rows is None:
        return None
    return found[0], [found[1][int(row)] for row in rows]


def _ones_aside(node: Node) -> bool:
    """Whether a reshape makes axes of size 1 come or go before the last axis."""
    before, after = node.input(0).shape, node.output.shape
    return _without_ones(before) == _without_ones(after) and before[-1:] == after[-1:]


def _without_ones(shape: tuple[Dim, ...]) -> list[Dim]:
    return [dim for dim in shape if dim != 1]


def _repeats(value: Value) -> bool:
    """Whether a value is the same for every index of its first axis."""
    node = value.node
    if node is None:
        return False
    match node.op.name:
        case "mul" if len(node.inputs) == 2:
            return _repeats(node.input(0)) and node.input(1).type.rank < value.type.rank
        case "reshape":
            return node.input(0).shape[0] == value.shape[0] and _repeats(node.input(0))
        case "slice":
            return node.attr("axis") == 0 and _repeats(node.input(0))
        case "expand":
            return node.input(0).shape[:1] == (1,) and node.input(0).type.rank == value.type.rank
        case name:
            return name in ALONE and _repeats(node.input(0))


def _first(site: Site, value: Value) -> Value:
    """The first of a value that repeats along its first axis, without that axis, computed once."""
    node = value.node
    if node is None:
        raise ValueError("an input repeats nothing")
    shape = value.shape[1:]
    match node.op.name:
        case "slice":
            return _first(site, node.input(0))
        case "expand":
            row = site.op("reshape", node.input(0), shape=node.input(0).shape[1:])
            return row if row.shape == shape else site.op("expand", row, shape=shape)
        case "reshape":
            return site.op("reshape", _first(site, node.input(0)), shape=shape)
        case name:
            return site.op(name, _first(site, node.input(0)), *node.inputs[1:], **node.attrs)


RULES: dict[str, tuple[Rule, ...]] = {"concat": (one_axis_of_many,), "take": (one_axis_of_many,)}
