"""Operations that move data or make it from nothing."""

from __future__ import annotations

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder
from backends.onnx.emitters.rule import Rule, rule, simple
from compiler.ir.graph import Node
from compiler.ir.types import Dim


@rule("reshape", "shape")
def reshape(build: Builder, node: Node) -> ir.Value:
    return reshaped(build, build.arg(node, 0), node.input(0).shape, node.attr("shape"))


def reshaped(build: Builder, value: ir.Value, before: tuple[Dim, ...], after: tuple[Dim, ...]) -> ir.Value:
    """``value`` of the shape ``before`` in the shape ``after``, without asking for sizes where 0 and -1 say enough."""
    if before == after:
        return value
    return build.op("Reshape", value, _sizes(build, before, after))


def _sizes(build: Builder, before: tuple[Dim, ...], after: tuple[Dim, ...]) -> ir.Value:
    short: list[Dim] = []
    for axis, dim in enumerate(after):
        kept = isinstance(dim, str) and axis < len(before) and before[axis] == dim
        short.append(0 if kept else dim)
    named = [axis for axis, dim in enumerate(short) if isinstance(dim, str)]
    if len(named) > 1:
        return build.shape(after)
    return build.ints(*(dim if isinstance(dim, int) else -1 for dim in short))


@rule("transpose", "perm")
def transpose(build: Builder, node: Node) -> ir.Value:
    return build.op("Transpose", build.arg(node, 0), perm=node.attr("perm"))


@rule("slice", "axis", "start", "stop", "step")
def slice_(build: Builder, node: Node) -> ir.Value:
    start, stop = build.dim(node.attr("start")), build.dim(node.attr("stop"))
    axis, step = build.ints(node.attr("axis")), build.ints(node.attr("step"))
    return build.op("Slice", build.arg(node, 0), start, stop, axis, step)


@rule("concat", "axis")
def concat(build: Builder, node: Node) -> ir.Value:
    return build.op("Concat", *(build.arg(node, index) for index in range(len(node.inputs))), axis=node.attr("axis"))


@rule("expand", "shape")
def expand(build: Builder, node: Node) -> ir.Value:
    return build.op("Expand", build.arg(node, 0), build.shape(node.attr("shape")))


@rule("arange", "start", "stop")
def arange(build: Builder, node: Node) -> ir.Value:
    nothing = build.ints(0)
    start, stop = (build.op("Squeeze", build.dim(node.attr(name)), nothing) for name in ("start", "stop"))
    return build.op("Range", start, stop, build.scalar(1, torch.int64))


@rule("full", "shape", "value", "dtype")
def full(build: Builder, node: Node) -> ir.Value:
    value = build.scalar(node.attr("value"), node.attr("dtype"))
    return build.op("Expand", value, build.shape(node.attr("shape"))) if node.attr("shape") else value


@rule("gather", "axis")
def gather(build: Builder, node: Node) -> ir.Value:
    return build.op("GatherElements", build.arg(node, 0), build.arg(node, 1), axis=node.attr("axis"))


@rule("take", "axis")
def take(build: Builder, node: Node) -> ir.Value:
    return build.op("Gather", build.arg(node, 0), build.arg(node, 1), axis=node.attr("axis"))


@rule("scatter", "axis", "value")
def scatter(build: Builder, node: Node) -> ir.Value:
    index = build.arg(node, 1)
    value = build.scalar(node.attr("value"), node.input(0).type.dtype)
    updates = build.op("Expand", value, build.op("Shape", index))
    return build.op("ScatterElements", build.arg(node, 0), index, updates, axis=node.attr("axis"))


@rule("pad", "before", "after", "value")
def pad(build: Builder, node: Node) -> ir.Value:
    widths = build.ints(*node.attr("before"), *node.attr("after"))
    value = build.scalar(node.attr("value"), node.input(0).type.dtype)
    return build.op("Pad", build.arg(node, 0), widths, value)


@rule("split_heads", "heads")
def split_heads(build: Builder, node: Node) -> ir.Value:
    sizes = build.ints(0, 0, node.attr("heads"), -1)
    return build.op("Transpose", build.op("Reshape", build.arg(node, 0), sizes), perm=(0, 2, 1, 3))


@rule("merge_heads")
def merge_heads(build: Builder, node: Node) -> ir.Value:
    return build.op("Reshape", build.arg(node, 0), build.ints(0, 0, -1))


RULES: tuple[Rule, ...] = (
    simple("matmul", "MatMul"),
    reshape,
    transpose,
    slice_,
    concat,
    expand,
    arange,
    full,
    gather,
    take,
    scatter,
    pad,
    split_heads,
    merge_heads,
)
