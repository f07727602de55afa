"""Rules that bring equal programs into one form: no-ops go, layout changes merge, constants become attributes."""

from __future__ import annotations

import math

from compiler.frontend.params import constant_values, of_parameter, part, table
from compiler.ir.graph import Node, Param, Value
from compiler.rewrite.pattern import Match, attr, op, rule, var
from compiler.rewrite.site import Refused, Rule, Site, made_by
from compiler.weights.ops.basic import cast, concat, slice


def merge_reshapes(site: Site) -> Value | None:
    """reshape(reshape(x)) = reshape(x); a reshape to the same shape is x."""
    x = site.node.input(0)
    if x.shape == site.node.output.shape:
        return x
    inner = made_by(x, "reshape")
    return None if inner is None else site.op("reshape", inner.input(0), shape=site.node.attr("shape"))


def merge_transposes(site: Site) -> Value | None:
    """transpose(transpose(x)) = transpose(x); the identity permutation is x."""
    perm = site.node.attr("perm")
    if perm == tuple(range(len(perm))):
        return site.node.input(0)
    inner = made_by(site.node.input(0), "transpose")
    if inner is None:
        return None
    return site.op("transpose", inner.input(0), perm=tuple(inner.attr("perm")[axis] for axis in perm))


def slice_of_concat(site: Site) -> Value | None:
    """A slice that is exactly one part of a concatenation is that part."""
    joined = made_by(site.node.input(0), "concat")
    axis, start, stop = (site.node.attr(name) for name in ("axis", "start", "stop"))
    if joined is None or joined.attr("axis") != axis or site.node.attr("step") != 1:
        return None
    offset = 0
    for index in range(len(joined.inputs)):
        size = joined.input(index).shape[axis]
        if not isinstance(size, int):
            return None
        if (offset, offset + size) == (start, stop):
            return joined.input(index)
        offset += size
    return None


def slice_of_split_axis(site: Site) -> Value | None:
    """Slicing blocks of a last axis that was split into blocks is slicing the last axis."""
    split = made_by(site.node.input(0), "reshape")
    if split is None or site.node.attr("step") != 1:
        return None
    x, blocks, axis = split.input(0), split.output.shape, site.node.attr("axis")
    inner = _product(blocks[axis + 1 :])
    start, stop = site.node.attr("start"), site.node.attr("stop")
    splits = axis == x.type.rank - 1 and blocks[:axis] == x.shape[:axis] and len(blocks) > axis + 1
    if not splits or inner is None or not isinstance(start, int) or not isinstance(stop, int):
        return None
    block = site.op("slice", x, axis=axis, start=start * inner, stop=stop * inner)
    return site.op("reshape", block, shape=site.node.output.shape)


def _product(dims: tuple[int | str, ...]) -> int | None:
    product = 1
    for dim in dims:
        if not isinstance(dim, int):
            return None
        product *= dim
    return product


def select_of_pairs(site: Site) -> Value | None:
    """Element i of every pair of neighbours is every second element of the last axis from i."""
    chosen = made_by(site.node.input(0), "slice")
    pairs = None if chosen is None else made_by(chosen.input(0), "reshape")
    if chosen is None or pairs is None:
        return None
    x, out, shape = pairs.input(0), site.node.output, pairs.output.shape
    width = x.shape[-1]
    one = chosen.attr("axis") == len(shape) - 1 and chosen.output.shape[-1] == 1 and out.shape == shape[:-1]
    if not isinstance(width, int) or not one or shape[-2:] != (width // 2, 2):
        return None
    if (*shape[:-2], width) != x.shape:
        x = site.op("reshape", x, shape=(*shape[:-2], width))
    return site.op("slice", x, axis=x.type.rank - 1, start=chosen.attr("start"), stop=width, step=2)


def drop_empty_parts(site: Site) -> Value | None:
    """Parts of zero width add nothing to a concatenation."""
    axis = site.node.attr("axis")
    parts = [part for part in site.node.inputs if part is not None and part.shape[axis] != 0]
    if len(parts) == len(site.node.inputs):
        return None
    return parts[0] if len(parts) == 1 else site.op("concat", *parts, axis=axis)


def fold_constant(site: Site) -> Value | None:
    """A one-element constant operand is a scalar."""
    node = site.node
    if len(node.inputs) != 2:
        return None
    x, y = node.input(0), node.input(1)
    value = _single(y)
    if value is None and node.op.name in ("add", "mul"):
        x, value = y, _single(x)
    if value is None or x.shape != node.output.shape or x.type.dtype != node.output.type.dtype:
        return None
    return x if (node.op.name, value) in (("mul", 1.0), ("add", 0.0)) else site.op(node.op.name, x, scalar=value)


def _single(value: Value) -> float | None:
    if isinstance(value, Param):
        values = constant_values(value)
        return values[0] if values is not None and len(values) == 1 else None
    filled = made_by(value, "full")
    return None if filled is None else filled.attr("value")


def counted_positions(site: Site) -> Value | None:
    """The first n of a stored 0, 1, 2, ... are counted instead."""
    stored, start, stop = site.node.input(0), site.node.attr("start"), site.node.attr("stop")
    values = constant_values(stored) if isinstance(stored, Param) else None
    counts = values is not None and stored.shape[-1] == len(values) and list(values) == list(range(len(values)))
    if not counts or site.node.attr("axis") != stored.type.rank - 1 or site.node.attr("step") != 1:
        return None
    counted = site.op("arange", start=start, stop=stop)
    return site.op("reshape", counted, shape=site.node.output.shape)


def fold_expand(site: Site) -> Value | None:
    """Elementwise operations broadcast by themselves."""
    node = site.node
    for index, value in enumerate(node.inputs):
        wide = made_by(value, "expand")
        if wide is None:
            continue
        inputs = [wide.input(0) if i == index else other for i, other in enumerate(node.inputs)]
        if node.op.infer_types([other and other.type for other in inputs], node.attrs) == [node.output.type]:
            return site.op(node.op.name, *inputs, **node.attrs)
    return None


def linear_under_reshape(site: Site) -> Value | None:
    """A linear map does not care how its leading axes are arranged."""
    linear = made_by(site.node.input(0), "linear")
    inner = None if linear is None else made_by(linear.input(0), "reshape")
    if linear is None or inner is None or linear.output.single_user() is not site.node:
        return None
    if inner.input(0).shape[-1] != inner.output.shape[-1]:
        return None
    moved = site.op("linear", inner.input(0), *linear.inputs[1:])
    return site.op("reshape", moved, shape=site.node.attr("shape"))


_ROW_WISE = ("linear", "layer_norm", "rms_norm", "relu", "gelu", "silu", "tanh", "sigmoid", "add", "mul")


def unflattened_rows(site: Site) -> Value | None:
    """What is computed row by row on [N, D] and then viewed as [B, T, D] is computed on [B, T, D]."""
    rows, shape = site.node.input(0), site.node.output.shape
    node = made_by(rows, *_ROW_WISE)
    if node is None or rows.type.rank != 2 or len(shape) != 3 or shape[-1] != rows.shape[-1]:
        return None
    operands = [value for value in node.inputs if value is not None and value.type.rank == 2 and not _is_weight(value)]
    if rows.single_user() is not site.node or any(value.shape[0] != rows.shape[0] for value in operands):
        return None
    moved = {value: site.op("reshape", value, shape=(*shape[:2], value.shape[1])) for value in operands}
    inputs = [None if value is None else moved.get(value, value) for value in node.inputs]
    return site.op(node.op.name, *inputs, **node.attrs)


def _is_weight(value: Value) -> bool:
    return isinstance(value, Param)


def parts_of_parameter(site: Site) -> Value | None:
    """Rows of a parameter are a parameter."""
    whole = site.node.input(0)
    if not isinstance(whole, Param) or not whole.persistent or not all(map(_takes_rows, whole.users)):
        return None
    for index, node in enumerate(sorted(whole.users, key=lambda user: user.attr("start"))):
        rows = slice(whole.expr, 0, node.attr("start"), node.attr("stop"))
        site.graph.replace(node.output, part(site.graph, whole, index, rows))
    return None


def table_of_parts(site: Site) -> Value | None:
    """Parts of parameters, joined, are a parameter: a table that was taken apart to be resized."""
    found = [of_parameter(value) for value in site.node.inputs if value is not None]
    parts = [each for each in found if each is not None]
    if len(parts) < len(site.node.inputs) or len(parts) < 2:
        return None
    whole, axis = parts[0][0], site.node.attr("axis")
    return table(site.graph, whole, concat([cast(expr, whole.type.dtype) for _, expr in parts], axis))


def _takes_rows(node: Node) -> bool:
    if node.op.name != "slice" or node.attr("axis") != 0 or node.attr("step") != 1:
        return False
    return isinstance(node.attr("start"), int) and isinstance(node.attr("stop"), int)


_X = var("x")
_CUBIC = op("add", _X, op("mul", op("pow", _X, scalar=3.0), scalar=attr("cubic")))
_TANH = op("tanh", op("mul", _CUBIC, scalar=attr("slope")))


@rule(op("mul", op("mul", _X, scalar=0.5), op("add", _TANH, scalar=1.0)))
def gelu_by_tanh(site: Site, found: Match) -> Value | Refused:
    """x/2 * (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) is a gelu."""
    if not math.isclose(found["cubic"], 0.044715) or not math.isclose(found["slope"], math.sqrt(2 / math.pi)):
        return Refused(f"{found['slope']} and {found['cubic']} are not the constants of a gelu")
    return site.op("gelu", found.value("x"), approximate="tanh")


RULES: dict[str, tuple[Rule, ...]] = {
    "reshape": (merge_reshapes, select_of_pairs, linear_under_reshape, unflattened_rows),
    "transpose": (merge_transposes,),
    "slice": (slice_of_concat, slice_of_split_axis, counted_positions, parts_of_parameter),
    "concat": (drop_empty_parts, table_of_parts),
    "mul": (fold_constant, gelu_by_tanh, fold_expand),
    "add": (fold_constant, fold_expand),
    "sub": (fold_constant, fold_expand),
    "div": (fold_constant, fold_expand),
    "minimum": (fold_constant,),
    "maximum": (fold_constant,),
}
