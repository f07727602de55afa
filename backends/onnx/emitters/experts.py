"""Experts: those with codes as one operation, others a scan, each computing the tokens that chose it and no others."""

from __future__ import annotations

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder
from backends.onnx.emitters.coded_experts import coded_experts
from backends.onnx.emitters.rule import Rule, rule
from compiler.errors import TargetError
from compiler.ir.graph import Node

SCANNED = ("gate_up", "down", "gate_up_bias", "down_bias")


@rule("experts", "activation", "alpha", "limit")
def experts(build: Builder, node: Node) -> ir.Value:
    made = coded_experts(build, node)
    return _scan(build, node) if made is None else made


def _scan(build: Builder, node: Node) -> ir.Value:
    x, indices, weights = (build.arg(node, index) for index in range(3))
    stacks = {name: build.optional(node, index) for index, name in enumerate(SCANNED, 3)}
    given = {name: value for name, value in stacks.items() if value is not None}
    zeros = build.op("Expand", build.constant(torch.tensor(0.0), exact=True), build.op("Shape", x))
    first = node.input(3).shape[0]
    assert isinstance(first, int)  # weights have whole numbers of experts
    numbers = build.constant(torch.arange(first))
    body = _body(build, node, x, indices, weights, list(given))
    total = build.op("Scan", zeros, numbers, *given.values(), body=body, num_scan_inputs=1 + len(given))
    return _cast(build, total, build.kind(torch.float32))


def _cast(build: Builder, value: ir.Value, kind: ir.DataType) -> ir.Value:
    """What experts give is summed in float32, whatever else is computed in."""
    return value if build.target.real == torch.float32 else build.op("Cast", value, to=kind)


def _body(outer: Builder, node: Node, x: ir.Value, indices: ir.Value, weights: ir.Value, names: list[str]) -> ir.Graph:
    """One expert: the rows of ``x`` that chose it, through it, weighted, and added to the sum so far."""
    build = outer.inner()
    total = ir.Value(name=build.fresh("total"), type=ir.TensorType(ir.DataType.FLOAT))
    number = ir.Value(name=build.fresh("expert"), type=ir.TensorType(ir.DataType.INT64))
    scanned = {name: ir.Value(name=build.fresh(name), type=ir.TensorType(build.kind(torch.float32))) for name in names}
    chosen = build.op("Equal", indices, number)
    share = build.op("ReduceSum", build.op("Where", chosen, weights, build.scalar(0.0)), build.ints(1), keepdims=1)
    hits = build.op("ReduceMax", build.op("Cast", chosen, to=ir.DataType.INT32), build.ints(1), keepdims=0)
    rows = build.op("Squeeze", build.op("NonZero", hits), build.ints(0))
    inner = _linear(build, build.op("Gather", x, rows, axis=0), scanned["gate_up"], scanned.get("gate_up_bias"))
    inner = _gated(build, node, inner)
    result = _linear(build, inner, scanned["down"], scanned.get("down_bias"))
    weighted = _cast(build, build.op("Mul", result, build.op("Gather", share, rows, axis=0)), ir.DataType.FLOAT)
    places = build.op("Unsqueeze", rows, build.ints(1))
    summed = build.op("ScatterND", total, places, weighted, reduction="add")
    summed.type, summed.shape = ir.TensorType(ir.DataType.FLOAT), None
    return ir.Graph(
        [total, number, *scanned.values()],
        [summed],
        nodes=build.nodes,
        initializers=list(build.constants.values()),
        name=build.fresh("expert"),
    )


def _linear(build: Builder, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    product = build.op("MatMul", x, build.op("Transpose", weight, perm=(1, 0)))
    return product if bias is None else build.op("Add", product, bias)


def _gated(build: Builder, node: Node, inner: ir.Value) -> ir.Value:
    """The gated unit of an expert, from its gate and up halves."""
    kind, alpha, limit = (node.attr(name) for name in ("activation", "alpha", "limit"))
    gate, up = build.ops("Split", inner, count=2, axis=-1, num_outputs=2)
    match kind:
        case "clamped_swish":
            gate = build.op("Min", gate, build.scalar(limit))
            up = build.op("Clip", up, build.scalar(-limit), build.scalar(limit))
            turned = build.op("Sigmoid", build.op("Mul", gate, build.scalar(alpha)))
            return build.op("Mul", build.op("Add", up, build.scalar(1.0)), build.op("Mul", gate, turned))
        case "silu":
            gate = build.op("Mul", gate, build.op("Sigmoid", gate))
        case "gelu" | "gelu_tanh":
            gate = build.op("Gelu", gate, approximate="tanh" if kind == "gelu_tanh" else "none")
        case "relu":
            gate = build.op("Relu", gate)
        case _:
            raise TargetError(f"experts with the activation {kind} have no ONNX form", where=node.scope)
    return build.op("Mul", gate, up)


RULES: tuple[Rule, ...] = (experts,)
