"""Cached attention by ONNX Runtime's GroupQueryAttention, with all that it does on the way.

Padding, windows and causality are numbers that it adds to scores, and positions are given: what it derives from
sequence lengths by itself would be wrong for samples that are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder, dense
from backends.onnx.cache import PAST_AXIS
from backends.onnx.emitters.linear import linear_map, stacked
from backends.onnx.emitters.norms import rms_scale
from backends.onnx.fusion import Grouped, Operand, rotary_table_of
from backends.onnx.target import CONTRIB
from compiler.ir.graph import Node, Param
from compiler.ir.types import Dim
from compiler.weights.ops.rotary import rotary_table

CODED = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}


def grouped_attention(build: Builder, node: Node, parts: Grouped) -> ir.Value:
    """[B, T, H, d], or [B, T, H * d] when ``parts`` merges heads itself."""
    cache = build.cache
    assert cache is not None  # only cached attention is grouped
    heads, groups, width = (int(dim) for dim in (node.input(0).shape[1], *node.input(1).shape[1::2]))
    names = [cache.name(node, what) for what in ("key", "value")]
    scales = _scales(build, parts)
    kind, axis = ir.DataType.INT8 if scales else build.kind(torch.float32), cache.axis(cache.new(node), PAST_AXIS)
    apart = cache.new(node) in cache.stages or _scored(node)
    own = build.target.right and not apart
    past = [cache.entry(name, groups, width, kind, past=axis) for name in names]
    codes = () if build.many else scales
    if scales and build.many:  # the kernel reads prompts faster into floats
        past = [build.op("DequantizeLinear", value, scale) for value, scale in zip(past, scales, strict=True)]
    outputs = build.ops(
        "GroupQueryAttention",
        *(_turned(build, node, parts) if apart else _projected(build, parts)),
        *past,
        *(_counted(build) if own else _lengths(build, cache.new(node))),
        *_tables(build, None if apart else parts.query.rope, given=not own),
        None if own else build.masks.of(node),
        build.optional(node, 5),
        *codes,
        count=3,
        domain=CONTRIB,
        num_heads=heads,
        kv_num_heads=groups,
        scale=node.attr("scale"),
        **_attributes(node, None if apart else parts),
        **({"local_window_size": node.attr("window")} if own and node.attr("window") else {}),
        **(CODED if codes else {}),
    )
    for index, (name, value) in enumerate(zip(names, outputs[1:], strict=True)):
        coded = build.op("QuantizeLinear", value, scales[index], _nothing(build)) if scales and build.many else value
        cache.leave(name, coded)
    return outputs[0] if parts.merge else build.op("Reshape", outputs[0], build.ints(0, 0, heads, width))


def _scales(build: Builder, parts: Grouped) -> tuple[ir.Value, ...]:
    """The scales of keys and values that are cached as int8, of one element (of prompts: a scalar, as standard
    operations have it); none when they are cached as they are."""
    rounded = [part.rounded for part in (parts.key, parts.value) if part.rounded is not None]
    if not build.rounds:
        return ()
    shape = () if build.many else (1,)
    return tuple(build.constant(torch.full(shape, node.attr("scale")), exact=True) for node in rounded)


def _nothing(build: Builder) -> ir.Value:
    return build.constant(torch.tensor(0, dtype=torch.int8))


def _attributes(node: Node, parts: Grouped | None) -> dict[str, int | float]:
    """Only those that differ from the defaults; without ``parts`` queries and keys are turned already."""
    found: dict[str, int | float] = {}
    if parts is not None and parts.query.rope is not None:
        found |= {"do_rotary": 1, "rotary_interleaved": int(parts.query.rope.attr("layout") != "half")}
    return found | ({"softcap": node.attr("softcap")} if node.attr("softcap") else {})


def _projected(build: Builder, parts: Grouped) -> Sequence[ir.Value | None]:
    """Query, key and value with heads side by side; all in the first when they are projected together."""
    if not parts.projections:
        return [_flat(build, operand) for operand in (parts.query, parts.key, parts.value)]
    first = parts.projections[0]
    weights = [node.input(1) for node in parts.projections]
    biases = [bias for node in parts.projections if (bias := node.optional_input(2)) is not None]
    bias = stacked(build, biases) if biases else None
    return [linear_map(build, build.arg(first, 0), stacked(build, weights), bias), None, None]


def _flat(build: Builder, operand: Operand) -> ir.Value:
    """Heads side by side, after their norm."""
    value, norm = build.value(operand.flat), operand.norm
    if norm is None:
        return value
    heads, width = norm.input(0).shape[1::2]
    apart = build.op("Reshape", value, build.ints(0, 0, int(heads), int(width)))
    normed = build.op("RMSNormalization", apart, rms_scale(build, norm), axis=-1, epsilon=norm.attr("eps"))
    return build.op("Reshape", normed, build.ints(0, 0, -1))


def _lengths(build: Builder, tokens: Dim) -> tuple[ir.Value, ir.Value]:
    """How many tokens there are where so many ``tokens`` are new: for every sample one less, and in all."""
    stage, name = build.masks.staged.get(tokens), f"lengths of {tokens}"
    given = build.masks.given if stage is None else stage.keys
    if name not in build.shared:
        total = build.op("Cast", build.op("Shape", given, start=1, end=2), to=ir.DataType.INT32)
        last = build.op("Sub", total, build.constant(torch.tensor([1], dtype=torch.int32)))
        batch = build.op("Shape", given, start=0, end=1)
        build.shared[name] = (build.op("Expand", last, batch), total)
    found = build.shared[name]
    return found[0], found[1]


def _counted(build: Builder) -> tuple[ir.Value, ir.Value]:
    """``_lengths`` of samples that are padded on the right: from how many tokens each has, all else follows."""
    given = build.masks.given
    if "counted" not in build.shared:
        total = build.op("Cast", build.op("Shape", given, start=1, end=2), to=ir.DataType.INT32)
        count = build.op("Cast", build.op("ReduceSum", given, build.ints(1), keepdims=0), to=ir.DataType.INT32)
        last = build.op("Sub", count, build.constant(torch.tensor([1], dtype=torch.int32)))
        build.shared["counted"] = (last, total)
    found = build.shared["counted"]
    return found[0], found[1]


def _tables(build: Builder, rope: Node | None, *, given: bool) -> Sequence[ir.Value | None]:
    """Cosines, sines and, where they are ``given``, the positions to look up."""
    return [None, None, None] if rope is None else [*_sines(build, rope), _turns(build) if given else None]


def _sines(build: Builder, rope: Node) -> list[ir.Value]:
    """Cosines and sines of all positions."""
    table = rotary_table_of(rope)
    assert table is not None  # a fused rope has one
    frequencies = table.input(1)
    assert isinstance(frequencies, Param)  # a fused rope's are
    return [
        build.store(
            f"{frequencies.name}.{function}",
            rotary_table(dense(frequencies), function, build.fusions.positions, table.attr("scale")),
        )
        for function in ("cos", "sin")
    ]


def _scored(node: Node) -> bool:
    """Whether what chooses tokens reads the queries or keys of ``node``."""
    return any(len(value.users) > 1 for value in node.inputs[:2] if value is not None)


def _turned(build: Builder, node: Node, parts: Grouped) -> Sequence[ir.Value]:
    """Query, key and value, turned one by one: positions in a stage have gaps, and others read what is turned."""
    made: list[ir.Value] = []
    for value, operand in zip(node.inputs[:3], (parts.query, parts.key, parts.value), strict=True):
        flat = _apart(build, operand)
        made.append(flat if operand.rope is None else _rotated(build, flat, operand.rope))
        if value is not None and len(value.users) > 1:
            heads, width = (int(dim) for dim in value.shape[1::2])
            split = build.op("Reshape", made[-1], build.ints(0, 0, heads, width))
            build.values[value] = build.op("Transpose", split, perm=(0, 2, 1, 3))
    return made


def _apart(build: Builder, operand: Operand) -> ir.Value:
    """``_flat``, with the projection that fusion took."""
    made = operand.flat.node
    if made is None or made not in build.fusions.absorbed or operand.flat in build.values:
        return _flat(build, operand)
    weight, bias = made.input(1), made.optional_input(2)
    assert isinstance(weight, Param) and (bias is None or isinstance(bias, Param))  # projections' are
    return linear_map(build, build.arg(made, 0), weight, bias)


def _rotated(build: Builder, flat: ir.Value, rope: Node) -> ir.Value:
    heads, tokens, width = rope.input(0).shape[1:]
    stage = build.masks.staged.get(tokens)
    turned = 2 * int(rope.input(1).shape[-1])
    partial = {"rotary_embedding_dim": turned} if turned != width else {}
    return build.contrib(
        "RotaryEmbedding",
        flat,
        build.masks.query_places() if stage is None else stage.turns,
        *_sines(build, rope),
        num_heads=int(heads),
        interleaved=int(rope.attr("layout") != "half"),
        **partial,
    )


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
