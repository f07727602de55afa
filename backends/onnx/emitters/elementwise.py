"""Elementwise operations, reductions and what looks along one axis."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder
from backends.onnx.emitters.rule import Rule, rule, simple
from compiler.ir.graph import Node

E4M3_MAX = 448.0
RELATIONS = {"eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater", "ge": "GreaterOrEqual"}


def _operands(build: Builder, node: Node) -> tuple[ir.Value, ir.Value]:
    """The two operands of a binary operation in one dtype: a scalar takes that of the tensor."""
    x, y = node.input(0), node.optional_input(1)
    if y is None:
        scalar = node.attr("scalar")
        return build.value(x), build.scalar(scalar if x.type.dtype.is_floating_point else int(scalar), x.type.dtype)
    dtype = torch.promote_types(x.type.dtype, y.type.dtype)
    return (_as(build, build.value(x), x.type.dtype, dtype), _as(build, build.value(y), y.type.dtype, dtype))


def _as(build: Builder, value: ir.Value, dtype: torch.dtype, wanted: torch.dtype) -> ir.Value:
    return value if dtype == wanted else build.op("Cast", value, to=build.kind(wanted))


def _binary(op: str, name: str) -> Rule:
    def emit(build: Builder, node: Node) -> ir.Value:
        return build.op(name, *_operands(build, node))

    return Rule(op, emit, frozenset({"scalar"}))


def _reduction(op: str, name: str) -> Rule:
    def emit(build: Builder, node: Node) -> ir.Value:
        axes = build.ints(*node.attr("axes"))
        return build.op(name, build.arg(node, 0), axes, keepdims=int(node.attr("keep")))

    return Rule(op, emit, frozenset({"axes", "keep"}))


@rule("rsqrt")
def rsqrt(build: Builder, node: Node) -> ir.Value:
    return build.op("Reciprocal", build.op("Sqrt", build.arg(node, 0)))


@rule("silu")
def silu(build: Builder, node: Node) -> ir.Value:
    x = build.arg(node, 0)
    return build.op("Mul", x, build.op("Sigmoid", x))


@rule("gelu", "approximate")
def gelu(build: Builder, node: Node) -> ir.Value:
    return build.op("Gelu", build.arg(node, 0), approximate=node.attr("approximate"))


@rule("cast", "dtype")
def cast(build: Builder, node: Node) -> ir.Value:
    return build.op("Cast", build.arg(node, 0), to=build.kind(node.attr("dtype")))


@rule("compare", "relation", "scalar")
def compare(build: Builder, node: Node) -> ir.Value:
    relation, operands = node.attr("relation"), _operands(build, node)
    if relation == "ne":
        return build.op("Not", build.op("Equal", *operands))
    return build.op(RELATIONS[relation], *operands)


@rule("fake_quantize", "type", "bits", "scale")
def fake_quantize(build: Builder, node: Node) -> ir.Value:
    x, dtype, bits = build.arg(node, 0), node.input(0).type.dtype, node.attr("bits")
    if not build.rounds:
        return x
    fp8 = node.attr("type") == "fp8"
    low, high = (-E4M3_MAX, E4M3_MAX) if fp8 else (-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1)
    scale = build.scalar(node.attr("scale"), dtype) if node.attr("scale") else _own_scale(build, x, dtype, high - low)
    codes = build.op("Clip", build.op("Div", x, scale), build.scalar(low, dtype), build.scalar(high, dtype))
    if fp8:
        codes = build.op("Cast", build.op("Cast", codes, to=ir.DataType.FLOAT8E4M3FN), to=build.kind(dtype))
    return build.op("Mul", codes if fp8 else build.op("Round", codes), scale)


def _own_scale(build: Builder, x: ir.Value, dtype: torch.dtype, span: float) -> ir.Value:
    """Of each last axis: its largest magnitude over half the ``span`` of codes."""
    largest = build.op("ReduceMax", build.op("Abs", x), build.ints(-1), keepdims=1)
    scale = build.op("Div", largest, build.scalar(span / 2, dtype))
    none = build.op("Equal", scale, build.scalar(0.0, dtype))
    return build.op("Where", none, build.scalar(torch.finfo(dtype).eps, dtype), scale)


@rule("argmax", "axis")
def argmax(build: Builder, node: Node) -> ir.Value:
    return build.op("ArgMax", build.arg(node, 0), axis=node.attr("axis"), keepdims=0)


@rule("softmax", "axis")
def softmax(build: Builder, node: Node) -> ir.Value:
    return build.op("Softmax", build.arg(node, 0), axis=node.attr("axis"))


@rule("cumsum", "axis")
def cumsum(build: Builder, node: Node) -> ir.Value:
    return build.op("CumSum", build.arg(node, 0), build.scalar(node.attr("axis"), torch.int64))


@rule("topk", "count", "axis")
def topk(build: Builder, node: Node) -> Sequence[ir.Value]:
    count = build.ints(node.attr("count"))
    return build.ops("TopK", build.arg(node, 0), count, count=2, axis=node.attr("axis"))


RULES: tuple[Rule, ...] = (
    simple("neg", "Neg"),
    simple("abs", "Abs"),
    simple("exp", "Exp"),
    simple("log", "Log"),
    simple("sqrt", "Sqrt"),
    simple("sin", "Sin"),
    simple("cos", "Cos"),
    simple("tanh", "Tanh"),
    simple("sigmoid", "Sigmoid"),
    simple("relu", "Relu"),
    simple("logical_not", "Not"),
    simple("where", "Where"),
    _binary("add", "Add"),
    _binary("sub", "Sub"),
    _binary("mul", "Mul"),
    _binary("div", "Div"),
    _binary("pow", "Pow"),
    _binary("minimum", "Min"),
    _binary("maximum", "Max"),
    _binary("logical_and", "And"),
    _binary("logical_or", "Or"),
    _reduction("sum", "ReduceSum"),
    _reduction("mean", "ReduceMean"),
    _reduction("max", "ReduceMax"),
    rsqrt,
    silu,
    gelu,
    cast,
    compare,
    fake_quantize,
    argmax,
    softmax,
    cumsum,
    topk,
)
