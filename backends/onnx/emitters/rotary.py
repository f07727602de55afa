"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from backends.onnx.builder import DTYPES, Builder
from backends.onnx.emitters.rule import Rule, rule
from compiler.ir.graph import Node, Param


@rule("rope_table", "scale")
def rope_table(build: Builder, node: Node) -> Sequence[ir.Value]:
    """Angles are never in half precision: it has no whole numbers beyond 2,048."""
    dtype = node.input(1).type.dtype
    places = build.op("Cast", build.arg(node, 0), to=DTYPES[dtype])
    angles = build.op("Mul", build.op("Unsqueeze", places, build.ints(-1)), _frequencies(build, node, dtype))
    scale, tables = node.attr("scale"), [_narrowed(build, build.op(name, angles), dtype) for name in ("Cos", "Sin")]
    return tables if scale == 1.0 else [build.op("Mul", table, build.scalar(scale)) for table in tables]


def _frequencies(build: Builder, node: Node, dtype: torch.dtype) -> ir.Value:
    value = node.input(1)
    if isinstance(value, Param):
        return build.store(value.name, build.dense(value), DTYPES[dtype])
    return build.op("Cast", build.value(value), to=DTYPES[dtype]) if _is_narrow(build, dtype) else build.value(value)


def _narrowed(build: Builder, table: ir.Value, dtype: torch.dtype) -> ir.Value:
    return build.op("Cast", table, to=build.kind(dtype)) if _is_narrow(build, dtype) else table


def _is_narrow(build: Builder, dtype: torch.dtype) -> bool:
    return build.kind(dtype) != DTYPES[dtype]


@rule("rope", "layout")
def rope(build: Builder, node: Node) -> ir.Value:
    """The two members of each pair are taken apart, turned, and put where the layout says."""
    x, layout = build.arg(node, 0), node.attr("layout")
    cos, sin = (build.op("Unsqueeze", build.arg(node, index), build.ints(1)) for index in (1, 2))
    pairs, width = node.input(1).shape[-1], node.input(0).shape[-1]
    assert isinstance(pairs, int) and isinstance(width, int)  # inference has checked that pairs fit the width
    first, second = _members(build, x, pairs, layout == "half")
    real = build.op("Sub", build.op("Mul", first, cos), build.op("Mul", second, sin))
    imaginary = build.op("Add", build.op("Mul", second, cos), build.op("Mul", first, sin))
    rest = [] if width == 2 * pairs else [_part(build, x, 2 * pairs, width)]
    if layout != "interleaved":
        return build.op("Concat", real, imaginary, *rest, axis=-1)
    ahead = build.ints(-1)
    stacked = build.op("Concat", *(build.op("Unsqueeze", part, ahead) for part in (real, imaginary)), axis=-1)
    turned = build.op("Reshape", stacked, build.ints(0, 0, 0, 2 * pairs))
    return build.op("Concat", turned, *rest, axis=-1) if rest else turned


def _members(build: Builder, x: ir.Value, pairs: int, halves: bool) -> tuple[ir.Value, ir.Value]:
    if halves:
        return _part(build, x, 0, pairs), _part(build, x, pairs, 2 * pairs)
    return _part(build, x, 0, 2 * pairs, 2), _part(build, x, 1, 2 * pairs, 2)


def _part(build: Builder, x: ir.Value, start: int, stop: int, step: int = 1) -> ir.Value:
    return build.op("Slice", x, *(build.ints(number) for number in (start, stop, -1, step)))


RULES: tuple[Rule, ...] = (rope_table, rope)
