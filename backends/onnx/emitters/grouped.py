"""Cached attention by ONNX Runtime's GroupQueryAttention, with all that it does on the way.

Padding, windows and causality are numbers that it adds to scores, and positions are given: what it derives from
sequence lengths by itself would be wrong for samples that are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder, dense
from backends.onnx.emitters.linear import linear_map
from backends.onnx.emitters.norms import rms_scale
from backends.onnx.fusion import Grouped, Operand
from backends.onnx.quantised import joined
from backends.onnx.target import CONTRIB
from compiler.ir.graph import Node, Param, Value
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import concat
from compiler.weights.ops.rotary import rotary_table

CODED = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}


def grouped_attention(build: Builder, node: Node, parts: Grouped) -> ir.Value:
    """[B, T, H, d], or [B, T, H * d] when ``parts`` merges heads itself."""
    cache = build.cache
    assert cache is not None  # only cached attention is grouped
    heads, groups, width = (int(dim) for dim in (node.input(0).shape[1], *node.input(1).shape[1::2]))
    names = [cache.name(node, what) for what in ("key", "value")]
    codes = _codes(build, parts)
    past = [cache.entry(name, groups, width, ir.DataType.INT8 if codes else ir.DataType.FLOAT) for name in names]
    outputs = build.ops(
        "GroupQueryAttention",
        *_projected(build, parts),
        *past,
        *_lengths(build),
        *_tables(build, parts.query.rope),
        build.masks.of(node),
        build.optional(node, 5),
        *codes,
        count=3,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=groups,
        scale=node.attr("scale"),
        **_attributes(node, parts),
        **(CODED if codes else {}),
    )
    for name, value in zip(names, outputs[1:], strict=True):
        cache.leave(name, value)
    return outputs[0] if parts.merge else build.op("Reshape", outputs[0], build.ints(0, 0, heads, width))


def _codes(build: Builder, parts: Grouped) -> tuple[ir.Value, ...]:
    """The scales of keys and values that are cached as int8; none when they are cached as they are."""
    rounded = [part.rounded for part in (parts.key, parts.value) if part.rounded is not None]
    if not build.rounds:
        return ()
    return tuple(build.constant(torch.tensor([node.attr("scale")], dtype=torch.float32)) for node in rounded)


def _attributes(node: Node, parts: Grouped) -> dict[str, int | float]:
    """Only those that differ from the defaults."""
    found: dict[str, int | float] = {}
    if parts.query.rope is not None:
        found |= {"do_rotary": 1, "rotary_interleaved": int(parts.query.rope.attr("layout") != "half")}
    return found | ({"softcap": node.attr("softcap")} if node.attr("softcap") else {})


def _projected(build: Builder, parts: Grouped) -> Sequence[ir.Value | None]:
    """Query, key and value with heads side by side; all in the first when they are projected together."""
    if not parts.projections:
        return [_flat(build, operand) for operand in (parts.query, parts.key, parts.value)]
    first = parts.projections[0]
    weights = [node.input(1) for node in parts.projections]
    biases = [bias for node in parts.projections if (bias := node.optional_input(2)) is not None]
    bias = _stacked(build, biases) if biases else None
    return [linear_map(build, build.arg(first, 0), _stacked(build, weights), bias), None, None]


def _flat(build: Builder, operand: Operand) -> ir.Value:
    """Heads side by side, after their norm."""
    value, norm = build.value(operand.flat), operand.norm
    if norm is None:
        return value
    heads, width = norm.input(0).shape[1::2]
    apart = build.op("Reshape", value, build.ints(0, 0, int(heads), int(width)))
    normed = build.op("RMSNormalization", apart, rms_scale(build, norm), axis=-1, epsilon=norm.attr("eps"))
    return build.op("Reshape", normed, build.ints(0, 0, -1))


def _stacked(build: Builder, values: Sequence[Value]) -> Param:
    """Parameters on top of one another, as one."""
    params = [value for value in values if isinstance(value, Param)]
    expr: Expr = joined(params) or concat([build.dense(param) for param in params], 0)
    name = ".and.".join([params[0].name, *(param.name.rpartition(".")[0].rpartition(".")[2] for param in params[1:])])
    return Param(name, expr.type.with_dtype(params[0].type.dtype), expr=expr, storage=expr.dtype)


def _lengths(build: Builder) -> tuple[ir.Value, ir.Value]:
    """How many tokens there are: for every sample one less, and in all."""
    given = build.masks.given
    assert given is not None and given.shape is not None  # a cached model has a mask
    if "lengths" not in build.shared:
        total = build.op("Cast", build.op("Shape", given, start=1, end=2), to=ir.DataType.INT32)
        last = build.op("Sub", total, build.constant(torch.tensor([1], dtype=torch.int32)))
        batch = build.op("Shape", given, start=0, end=1)
        build.shared["lengths"] = (build.op("Expand", last, batch), total)
    found = build.shared["lengths"]
    return found[0], found[1]


def _tables(build: Builder, rope: Node | None) -> Sequence[ir.Value | None]:
    """Cosines, sines and the positions to look up."""
    if rope is None:
        return [None, None, None]
    table = rope.input(1).node
    assert table is not None  # a fused rope has one
    frequencies = table.input(1)
    assert isinstance(frequencies, Param)  # a fused rope's are
    made = [
        build.store(
            f"{frequencies.name}.{function}",
            rotary_table(dense(frequencies), function, build.fusions.positions, table.attr("scale")),
        )
        for function in ("cos", "sin")
    ]
    return [*made, _turns(build)]


def _turns(build: Builder) -> ir.Value:
    """How far new tokens are turned: by their column, less the padding that lies between tokens before it.

    Of several new tokens the kernel reads the turn of the first one in the batch and counts on from there, for all
    samples. So padding on the left has to count; only differences between turns matter.
    """
    if "turns" not in build.shared:
        masks = build.masks
        before = build.op("ArgMax", masks.given, axis=1, keepdims=1)
        counted = build.op("Add", masks.query_places(), before)
        build.shared["turns"] = (build.op("Min", counted, masks.query_columns()),)
    return build.shared["turns"][0]
