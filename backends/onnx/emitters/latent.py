"""Latent attention that never expands its cache (the absorbed form of DeepSeek-V2, arXiv 2405.04434).

A head's key rows of the up-projection are multiplied into its query, its value rows into what it has mixed, so that all
heads attend to the same [latent ; rotary key], one vector for each token, which is what is cached.
"""

from __future__ import annotations

import onnx_ir as ir

from backends.onnx.builder import Builder
from backends.onnx.cache import Cache
from backends.onnx.emitters.attention import scaled_product, softmaxed
from backends.onnx.emitters.rule import Rule, rule
from compiler.errors import TargetError
from compiler.ir.graph import Node, Param
from compiler.weights.ops import take
from compiler.weights.ops.basic import reshape, transpose


@rule("latent_attention", "scale", "causal", "window", "softcap")
def latent_attention(build: Builder, node: Node) -> ir.Value:
    query, latent, rotary = build.arg(node, 0), build.arg(node, 1), build.optional(node, 2)
    heads, width, rank = (int(dim) for dim in (*node.input(0).shape[1::2], node.input(1).shape[-1]))
    rotated = 0 if rotary is None else int(node.input(2).shape[-1])
    keys, values = _halves(build, node, heads, width - rotated)
    held = latent if rotary is None else build.op("Concat", latent, rotary, axis=-1)
    held = build.op("Unsqueeze", held, build.ints(1))
    if build.cache is not None and build.cache.holds(node):
        held = _kept(build, build.cache, node, held, rank + rotated)
    absorbed = _absorbed(build, query, keys, rank, width - rotated, rotated)
    folded = build.op("Reshape", absorbed, build.ints(0, 1, -1, rank + rotated))
    scores = build.op("Reshape", scaled_product(build, folded, held, node.attr("scale")), build.ints(0, heads, -1, 0))
    weights = build.op("Reshape", softmaxed(build, node, scores), build.ints(0, 1, -1, 0))
    mixed = build.op("Reshape", build.op("MatMul", weights, held), build.ints(0, heads, -1, rank + rotated))
    if rotated:
        mixed = build.op("Slice", mixed, build.ints(0), build.ints(rank), build.ints(3))
    return build.op("Transpose", build.op("MatMul", mixed, values), perm=(0, 2, 1, 3))


def _kept(build: Builder, cache: Cache, node: Node, new: ir.Value, width: int) -> ir.Value:
    """Latents of past and new tokens: in a buffer, where the target writes into one and no tokens are dropped."""
    if build.target.scatters and cache.new(node) == cache.tokens:
        return cache.written(node, "latent", new, width)
    return cache.extended(node, "latent", new, 1, width)


def _absorbed(
    build: Builder, query: ir.Value, keys: ir.Value | None, rank: int, unrotated: int, rotated: int
) -> ir.Value:
    """Queries [B, H, T, rank + R] for latents and rotary keys from those [B, H, T, n + R] for expanded keys."""
    if keys is None:  # latents make values alone
        return build.op("Pad", query, build.ints(rank, 0), None, build.ints(3))
    if not rotated:
        return build.op("MatMul", query, keys)
    sizes = build.ints(unrotated, rotated)
    plain, turned = build.ops("Split", query, sizes, count=2, axis=-1)
    return build.op("Concat", build.op("MatMul", plain, keys), turned, axis=-1)


def _halves(build: Builder, node: Node, heads: int, unrotated: int) -> tuple[ir.Value | None, ir.Value]:
    """The up-projection's key rows [H, n, rank], if there are any, and its value rows, transposed, [H, rank, v]."""
    up = node.input(3)
    if not isinstance(up, Param):
        raise TargetError("latent attention whose up-projection is computed has no ONNX form", where=node.scope)
    rows, rank = up.type.static_shape
    each = reshape(build.dense(up), (heads, rows // heads, rank))
    keys = build.store(f"{up.name}.keys", take(each, 1, 0, unrotated)) if unrotated else None
    values = transpose(take(each, 1, unrotated, rows // heads), (0, 2, 1))
    return keys, build.store(f"{up.name}.values", values)


RULES: tuple[Rule, ...] = (latent_attention,)
