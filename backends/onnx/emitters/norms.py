"""Norms over the last axis."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder, dense
from backends.onnx.emitters.rule import Rule, rule
from backends.onnx.target import CONTRIB
from compiler.ir.graph import Node, Param
from compiler.weights.ops.basic import add, full


@rule("rms_norm", "eps", "offset")
def rms_norm(build: Builder, node: Node) -> ir.Value:
    total = build.fusions.skips.get(node)
    if total is not None:
        operands = (build.arg(total, 0), build.arg(total, 1), rms_scale(build, node))
        return _with_sum(build, "SkipSimplifiedLayerNormalization", operands, node, total)
    return build.op("RMSNormalization", build.arg(node, 0), rms_scale(build, node), axis=-1, epsilon=node.attr("eps"))


def rms_scale(build: Builder, node: Node) -> ir.Value:
    """The scale of a norm, with what the model adds to it."""
    weight, offset = node.optional_input(1), node.attr("offset")
    if weight is None:
        return _ones(build, node)
    if not offset:
        return build.value(weight)
    if isinstance(weight, Param):
        expr = dense(weight)
        return build.store(weight.name, add(full(expr.shape, offset, expr.dtype), expr))
    return build.op("Add", build.value(weight), build.scalar(offset))


@rule("layer_norm", "eps")
def layer_norm(build: Builder, node: Node) -> ir.Value:
    weight = build.optional(node, 1) or _ones(build, node)
    bias = build.optional(node, 2)
    total = build.fusions.skips.get(node)
    if total is not None:
        operands = (build.arg(total, 0), build.arg(total, 1), weight, bias)
        return _with_sum(build, "SkipLayerNormalization", operands, node, total)
    return build.op("LayerNormalization", build.arg(node, 0), weight, bias, axis=-1, epsilon=node.attr("eps"))


def _with_sum(build: Builder, name: str, operands: Sequence[ir.Value | None], node: Node, total: Node) -> ir.Value:
    """A norm that also gives the sum it takes the norm of."""
    made = build.ops(name, *operands, count=4, domain=CONTRIB, epsilon=node.attr("eps"))
    for unused in made[1:3]:
        unused.name = ""  # an output without a name is not computed
    build.bind(total.output, made[3])
    return made[0]


def _ones(build: Builder, node: Node) -> ir.Value:
    width = node.input(0).shape[-1]
    if not isinstance(width, int):
        return build.op("Expand", build.scalar(1.0), build.dim(width))
    return build.constant(torch.ones(width))


RULES: tuple[Rule, ...] = (rms_norm, layer_norm)
