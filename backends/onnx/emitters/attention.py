"""Attention in products and a softmax, for what no single operation computes alike.

Query heads that share a key head are rows of one product: nothing is repeated.
"""

from __future__ import annotations

import onnx_ir as ir

from backends.onnx.builder import Builder
from backends.onnx.emitters.grouped import grouped_attention
from backends.onnx.emitters.rule import Rule, rule
from compiler.ir.graph import Node


@rule("attention", "scale", "causal", "window", "softcap")
def attention(build: Builder, node: Node) -> ir.Value:
    parts = build.fusions.grouped.get(node)
    if parts is not None:
        return grouped_attention(build, node, parts)
    query, key, value = (build.arg(node, index) for index in range(3))
    groups, width, depth = node.input(1).shape[1], node.input(1).shape[3], node.input(2).shape[3]
    cache = build.cache
    if cache is not None and cache.holds(node):
        key = cache.extended(node, "key", key, groups, width)
        value = cache.extended(node, "value", value, groups, depth)
    heads = node.input(0).shape[1]
    scores = scaled_product(build, _rows(build, query, groups, heads), key, node.attr("scale"))
    weights = _rows(build, softmaxed(build, node, _rows(build, scores, heads, groups)), groups, heads)
    mixed = _rows(build, build.op("MatMul", weights, value), heads, groups)
    return build.op("Transpose", mixed, perm=(0, 2, 1, 3))


def _rows(build: Builder, value: ir.Value, heads: int | str, before: int | str) -> ir.Value:
    """[B, before, n, d] as [B, heads, n * before / heads, d]."""
    return value if heads == before else build.op("Reshape", value, build.ints(0, int(heads), -1, 0))


def scaled_product(build: Builder, query: ir.Value, key: ir.Value, scale: float) -> ir.Value:
    """scale * query @ key.T over the last axes."""
    if build.target.contrib:
        return build.contrib("FusedMatMul", query, key, transB=1, alpha=scale)
    product = build.op("MatMul", query, build.op("Transpose", key, perm=(0, 1, 3, 2)))
    return product if scale == 1.0 else build.op("Mul", product, build.scalar(scale))


def softmaxed(build: Builder, node: Node, scores: ir.Value) -> ir.Value:
    """Weights from scores [B, H, T, S]: bent, biased, masked, and with sinks beside them."""
    cap = node.attr("softcap")
    if cap:
        bent = build.op("Tanh", build.op("Div", scores, build.scalar(cap)))
        scores = build.op("Mul", bent, build.scalar(cap))
    plain = node.op.name == "attention"
    bias = build.optional(node, 4) if plain else None
    mask = build.masks.of(node)
    given = node.optional_input(3 if plain else 4)
    for added in (bias, mask, None if given is None else build.masks.exists(build.value(given))):
        scores = scores if added is None else build.op("Add", scores, added)
    sinks = build.optional(node, 5) if plain else None
    return build.op("Softmax", scores, axis=-1) if sinks is None else _beside(build, scores, sinks)


def _beside(build: Builder, scores: ir.Value, sinks: ir.Value) -> ir.Value:
    """A softmax over scores and one sink a head, of which the sink's share is dropped."""
    column = build.op("Reshape", sinks, build.ints(1, -1, 1, 1))
    sizes = build.op("Concat", build.op("Shape", scores, end=3), build.ints(1), axis=0)
    joined = build.op("Concat", scores, build.op("Expand", column, sizes), axis=3)
    weights = build.op("Softmax", joined, axis=-1)
    return build.op("Slice", weights, build.ints(0), build.ints(-1), build.ints(3))


RULES: tuple[Rule, ...] = (attention,)
