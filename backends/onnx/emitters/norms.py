"""Norms over the last axis."""

from __future__ import annotations

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder, dense
from backends.onnx.emitters.rule import Rule, rule
from compiler.ir.graph import Node, Param
from compiler.weights.ops.basic import add, full


@rule("rms_norm", "eps", "offset")
def rms_norm(build: Builder, node: Node) -> ir.Value:
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
    return build.op("LayerNormalization", build.arg(node, 0), weight, bias, axis=-1, epsilon=node.attr("eps"))


def _ones(build: Builder, node: Node) -> ir.Value:
    width = node.input(0).shape[-1]
    if not isinstance(width, int):
        return build.op("Expand", build.scalar(1.0), build.dim(width))
    return build.constant(torch.ones(width))


RULES: tuple[Rule, ...] = (rms_norm, layer_norm)
