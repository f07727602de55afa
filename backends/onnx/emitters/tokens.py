"""Which tokens remain, and values that follow. Where samples are padded, each keeps its part of its own tokens: what it
has fewer of than others is padding from there on, so that a sample gives in a batch what it gives alone."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder
from backends.onnx.emitters.attention import scaled_product
from backends.onnx.emitters.rule import Rule, rule
from backends.onnx.masks import END
from compiler.errors import TargetError
from compiler.ir.graph import Node
from compiler.ir.types import Dim, canonical_dim, resolve_dim

TINY = 1e-12
APART = -4.0  # less than any cosine


@rule("token_scores", "rows", "step", "scale", "causal")
def token_scores(build: Builder, node: Node) -> ir.Value:
    query, key, (_, heads, _, _) = build.arg(node, 0), build.arg(node, 1), node.input(0).shape
    exists, groups = build.masks.exists_of(node.input(1).shape[2]), node.input(1).shape[1]
    rows = _rows(build, node, query, exists)
    grouped = rows if heads == groups else build.op("Reshape", rows, build.ints(0, int(groups), -1, 0))
    scores = scaled_product(build, grouped, key, node.attr("scale"))
    if heads != groups:
        scores = build.op("Reshape", scores, build.ints(0, int(heads), -1, 0))
    if node.attr("causal") and node.attr("rows") == "all":
        scores = build.op("Add", scores, _earlier(build, node))
    if exists is not None:
        scores = build.op("Add", scores, build.masks.exists(exists))
    return _mean(build, node, build.op("Softmax", scores, axis=-1), exists)


def _rows(build: Builder, node: Node, query: ir.Value, exists: ir.Value | None) -> ir.Value:
    """The queries that count, [B, H, Q, d]; the first or last of each sample is picked by a product."""
    axis, end = build.ints(2), build.ints(END)
    if node.attr("rows") == "all":
        step = node.attr("step")
        return query if step == 1 else build.op("Slice", query, build.ints(0), end, axis, build.ints(step))
    if exists is None:
        start, stop = (build.ints(0), build.ints(1)) if node.attr("rows") == "first" else (build.ints(-1), end)
        return build.op("Slice", query, start, stop, axis)
    wanted = build.scalar(1, torch.int64) if node.attr("rows") == "first" else _total(build, exists)
    counted = build.op("Mul", build.op("CumSum", exists, build.scalar(1, torch.int64)), exists)
    picked = build.op("Cast", build.op("Equal", counted, wanted), to=build.kind(torch.float32))
    return build.op("MatMul", build.op("Unsqueeze", picked, build.ints(1, 2)), query)


def _earlier(build: Builder, node: Node) -> ir.Value:
    """What is added to scores [B, H, Q, S] so that a query sees none after it."""
    keys = build.masks.count(node.input(1).shape[2])
    end, axis, step = build.ints(END), build.ints(1), build.ints(node.attr("step"))
    queries = build.op("Slice", build.masks.count(node.input(0).shape[2]), build.ints(0), end, axis, step)
    row = build.op("Unsqueeze", queries, build.ints(1, 3))
    seen = build.op("LessOrEqual", build.op("Unsqueeze", keys, build.ints(1, 2)), row)
    return build.masks.additive(seen)


def _mean(build: Builder, node: Node, weights: ir.Value, exists: ir.Value | None) -> ir.Value:
    """Over heads and queries, of which padding has none."""
    axes = build.ints(1, 2)
    if exists is None or node.attr("rows") != "all":
        return build.op("ReduceMean", weights, axes, keepdims=0)
    end, step = build.ints(END), build.ints(node.attr("step"))
    own = build.op("Slice", exists, build.ints(0), end, build.ints(1), step)
    shares = build.op("Cast", build.op("Unsqueeze", own, build.ints(1, 3)), to=build.kind(torch.float32))
    summed = build.op("ReduceSum", build.op("Mul", weights, shares), axes, keepdims=0)
    heads = build.scalar(float(node.input(0).shape[1]))
    count = build.op("ReduceSum", shares, build.ints(1, 2, 3), keepdims=0)
    return build.op("Div", summed, build.op("Mul", build.op("Unsqueeze", count, build.ints(1)), heads))


def _total(build: Builder, exists: ir.Value) -> ir.Value:
    return build.op("ReduceSum", exists, build.ints(1), keepdims=1)


@rule("token_blocks", "size")
def token_blocks(build: Builder, node: Node) -> ir.Value:
    """Means by a product with what says in which block each token is; padding is in none."""
    scores, tokens, size = build.arg(node, 0), node.input(0).shape[1], node.attr("size")
    exists, ahead, last = build.masks.exists_of(tokens), build.ints(1), build.ints(2)
    place = build.masks.count(tokens) if exists is None else _places(build, exists)
    block = build.op("Div", place, build.scalar(size, torch.int64))
    every = build.op("Unsqueeze", build.masks.count(canonical_dim(f"floor(({tokens}+{size - 1})/{size})")), ahead)
    inside = build.op(
        "Cast", build.op("Equal", build.op("Unsqueeze", block, last), every), to=build.kind(torch.float32)
    )
    if exists is not None:
        there = build.op("Cast", exists, to=build.kind(torch.float32))
        inside = build.op("Mul", inside, build.op("Unsqueeze", there, last))
        scores = build.op("Where", build.op("Cast", exists, to=ir.DataType.BOOL), scores, build.scalar(0.0))
    total = build.op("MatMul", build.op("Unsqueeze", scores, ahead), inside)
    count = build.op("Max", build.op("ReduceSum", inside, ahead, keepdims=1), build.scalar(1.0))
    spread = build.op("MatMul", build.op("Div", total, count), build.op("Transpose", inside, perm=(0, 2, 1)))
    return build.op("Squeeze", spread, ahead)


@rule("token_select", "keep", "prefix", "suffix")
def token_select(build: Builder, node: Node) -> Sequence[ir.Value]:
    tokens, keep = node.input(0).shape[1], node.attr("keep")
    stage = build.stages.chosen[node] if build.stages else None
    count = keep if stage is None else stage.count
    if tokens == build.masks.tokens and isinstance(tokens, str) and resolve_dim(count, {tokens: 1}) < 1:
        cause = f"`{count}` of {tokens} tokens remain, and ONNX models take prompts that are shorter"
        raise TargetError(cause, where=node.scope, remedy="drop tokens of pictures in the tower: `stack: vision_tower`")
    exists = build.masks.exists_of(tokens)
    scores = _protected(build, node, exists)
    with_rest = bool(node.outputs[1].users)
    order = build.ops("TopK", scores, build.dim(tokens if with_rest else keep), count=2)[1]
    first, gone = (order, order) if not with_rest else _cut(build, order, keep)
    index, places = build.ops("TopK", first, build.dim(keep), count=2, largest=0)
    if exists is not None:
        _pad(build, node, keep, exists, index, places)
    if not with_rest:
        return index, index  # nobody reads the second
    return index, build.ops("TopK", gone, build.dim(node.outputs[1].shape[1]), count=2, largest=0)[0]


def _cut(build: Builder, order: ir.Value, keep: Dim) -> tuple[ir.Value, ir.Value]:
    nothing, axis, end = build.ints(0), build.ints(1), build.ints(END)
    count = build.dim(keep)
    return build.op("Slice", order, nothing, count, axis), build.op("Slice", order, count, end, axis)


def _pad(build: Builder, node: Node, keep: Dim, exists: ir.Value, index: ir.Value, places: ir.Value) -> None:
    """Call what a sample keeps beyond its own part padding. ``places`` [B, K] are ranks by score of the tokens at
    ``index``."""
    masks, there = build.masks, _total(build, exists)
    came = masks.exists_of(masks.tokens)
    assert came is not None  # there is no padding without
    stage, whole = build.stages and build.stages.chosen[node], _total(build, came)
    if build.stages and stage:
        own = build.stages.own(stage, whole, there)
    else:
        own = build.op("Min", build.computed(keep, {str(masks.tokens): whole}), there)
    flags = build.op("Cast", build.op("Less", places, own), to=ir.DataType.INT64)
    masks.kept[keep] = flags
    masks.written[node.outputs[0]] = flags
    if build.stages and stage:
        build.stages.enter(stage, index, flags)


def _protected(build: Builder, node: Node, exists: ir.Value | None) -> ir.Value:
    """The scores [B, T], with those of the ends above and those of padding below all others."""
    scores, tokens = build.arg(node, 0), node.input(0).shape[1]
    prefix, suffix, high = node.attr("prefix"), node.attr("suffix"), torch.finfo(build.target.real).max
    place = build.masks.count(tokens) if exists is None else _places(build, exists)
    total = build.dim(tokens) if exists is None else _total(build, exists)
    if prefix:
        first = build.op("Less", place, build.scalar(prefix, torch.int64))
        scores = build.op("Where", first, build.scalar(high / 2), scores)
    if suffix:
        last = build.op("GreaterOrEqual", place, build.op("Sub", total, build.scalar(suffix, torch.int64)))
        scores = build.op("Where", last, build.scalar(high), scores)
    if exists is None:
        return scores
    return build.op("Where", build.op("Cast", exists, to=ir.DataType.BOOL), scores, build.scalar(-torch.inf))


def _places(build: Builder, exists: ir.Value) -> ir.Value:
    counted = build.op("CumSum", exists, build.scalar(1, torch.int64))
    return build.op("Sub", counted, build.scalar(1, torch.int64))


@rule("token_match", "keep", "prefix", "suffix")
def token_match(build: Builder, node: Node) -> Sequence[ir.Value]:
    tokens, keep, first = node.input(0).shape[1], node.attr("keep"), node.attr("prefix")
    exists, metric = build.masks.exists_of(tokens), build.arg(node, 0)
    if exists is not None and node.attr("suffix"):
        raise TargetError("of samples that may be padded the last tokens cannot stay unpaired", where=node.scope)
    length = build.op("Max", build.op("ReduceL2", metric, build.ints(2), keepdims=1), build.scalar(TINY))
    targets, sources = _sides(build, node, build.op("Div", metric, length))
    near = build.op("MatMul", sources, build.op("Transpose", targets, perm=(0, 2, 1)))
    there = None if exists is None else _sides(build, node, _paired(build, node, exists))
    if there is not None:
        near = build.op("Where", build.op("Unsqueeze", there[0], build.ints(1)), near, build.scalar(APART))
    # Where nothing can be merged into there is no best: one column more, which is met by none that goes.
    near = build.op("Pad", near, build.ints(0, 0, 0, 0, 0, 1), build.scalar(APART))
    best, partner = (build.op("Squeeze", x, build.ints(2)) for x in build.ops("TopK", near, build.ints(1), count=2))
    source = _merged(build, node, best, None if there is None else there[1])
    two, zero = build.scalar(2, torch.int64), build.scalar(0, torch.int64)
    rest = build.op("Add", build.op("Mul", source, two), build.scalar(first + 1, torch.int64))
    met = build.op("Mul", build.op("GatherElements", partner, source, axis=1), two)
    target = build.op("Add", met, build.scalar(first, torch.int64))
    every = build.op("Expand", build.scalar(1, torch.int64), build.shape(node.input(0).shape[:2]))
    gone = build.op("Expand", zero, build.op("Shape", rest))
    remains = build.op("ScatterElements", every, rest, gone, axis=1)
    index = build.ops("TopK", remains, build.dim(keep), count=2)[1]
    if exists is not None:
        build.masks.kept[keep] = build.op("GatherElements", exists, index, axis=1)
    return index, rest, build.op("GatherElements", _places(build, remains), target, axis=1)


def _sides(build: Builder, node: Node, value: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The tokens of ``value`` [B, T, ...] between the ends that others can go into, and those that can go."""
    first, suffix = node.attr("prefix"), node.attr("suffix")
    stop, axis, two = build.ints(-suffix if suffix else END), build.ints(1), build.ints(2)
    even, odd = (build.op("Slice", value, build.ints(first + i), stop, axis, two) for i in range(2))
    return even, odd


def _paired(build: Builder, node: Node, exists: ir.Value) -> ir.Value:
    """Which tokens are there and not at the start of their sample, bool [B, T]."""
    first = build.op("GreaterOrEqual", _places(build, exists), build.scalar(node.attr("prefix"), torch.int64))
    return build.op("And", build.op("Cast", exists, to=ir.DataType.BOOL), first)


def _merged(build: Builder, node: Node, best: ir.Value, there: ir.Value | None) -> ir.Value:
    """Which of the tokens that can go do: each sample's own part, and then padding."""
    count = build.dim(node.outputs[1].shape[1])
    if there is None:
        return build.ops("TopK", best, count, count=2)[1]
    whole = build.op("Shape", best, start=1, end=2)
    order = build.ops("TopK", build.op("Where", there, best, build.scalar(APART)), whole, count=2)[1]
    given = build.masks.given
    assert given is not None  # there is no padding without
    own = build.computed(node.outputs[1].shape[1], {str(build.masks.tokens): _total(build, given)})
    bounds = [build.scalar(0, torch.int64), build.op("Squeeze", whole, build.ints(0)), build.scalar(1, torch.int64)]
    first = build.op("Less", build.op("Unsqueeze", build.op("Range", *bounds), build.ints(0)), own)
    padding = build.op("GatherElements", build.op("Cast", there, to=ir.DataType.INT64), order, axis=1)
    last = build.op("Sub", build.scalar(1, torch.int64), padding)
    ranked = build.op("Where", first, build.scalar(2, torch.int64), last)
    return build.op("GatherElements", order, build.ops("TopK", ranked, count, count=2)[1], axis=1)


@rule("token_take", "axis")
def token_take(build: Builder, node: Node) -> ir.Value:
    x, index, type = build.arg(node, 0), build.arg(node, 1), node.input(0).type
    axis = node.attr("axis") % type.rank
    if type.shape[0] == 1:
        return _picked(build, x, index, axis, type.rank)
    if axis == 1:
        return rows(build, x, index)
    perm = (0, axis, *(i for i in range(1, type.rank) if i != axis))
    back = tuple(perm.index(i) for i in range(type.rank))
    return build.op("Transpose", rows(build, build.op("Transpose", x, perm=perm), index), perm=back)


def rows(build: Builder, x: ir.Value, index: ir.Value) -> ir.Value:
    """x [B, T, ...] at the places [B, K] of each sample."""
    return build.op("GatherND", x, build.op("Unsqueeze", index, build.ints(2)), batch_dims=1)


def _picked(build: Builder, x: ir.Value, index: ir.Value, axis: int, rank: int) -> ir.Value:
    """x [1, ..., T, ...] of all samples at the places of each."""
    taken = build.op("Gather", build.op("Squeeze", x, build.ints(0)), index, axis=axis - 1)
    if axis == 1:
        return taken
    perm = (axis - 1, *range(axis - 1), *range(axis, rank))
    return build.op("Transpose", taken, perm=perm)


@rule("token_merge")
def token_merge(build: Builder, node: Node) -> Sequence[ir.Value]:
    x, weight, index, rest = (build.arg(node, i) for i in range(4))
    exists = build.masks.exists_of(node.input(0).shape[1])
    if exists is not None:  # padding counts for nothing
        weight = build.op("Mul", weight, build.op("Cast", exists, to=build.kind(torch.float32)))
    into, kept = build.optional(node, 4), rows(build, weight, index)
    shares = build.op("Unsqueeze", rows(build, weight, rest), build.ints(1))
    if into is not None:
        slots = build.op("Unsqueeze", build.masks.count(node.input(2).shape[1]), build.ints(2))
        met = build.op("Equal", slots, build.op("Unsqueeze", into, build.ints(1)))
        shares = build.op("Mul", build.op("Cast", met, to=build.kind(torch.float32)), shares)
    added = build.op("MatMul", shares, rows(build, x, rest))
    weights = build.op("ReduceSum", shares, build.ints(2), keepdims=0)
    own = build.op("Mul", rows(build, x, index), build.op("Unsqueeze", kept, build.ints(2)))
    if into is not None:
        total, summed = build.op("Add", kept, weights), build.op("Add", own, added)
    else:
        total, summed = build.op("Concat", kept, weights, axis=1), build.op("Concat", own, added, axis=1)
    least = total if exists is None else build.op("Max", total, build.scalar(TINY))
    return build.op("Div", summed, build.op("Unsqueeze", least, build.ints(2))), least


@rule("token_restore")
def token_restore(build: Builder, node: Node) -> ir.Value:
    """Each token's row in y and x, one after the other, and those rows."""
    x, y, index = (build.arg(node, i) for i in range(3))
    flags = build.masks.written.get(node.input(2))
    count, tokens = node.input(1).shape[1], node.input(0).shape[1]
    own = build.op("Add", build.masks.count(tokens), build.dim(count))
    place = build.op("Expand", own, build.shape(node.input(0).shape[:2]))
    slots = build.op("Expand", build.masks.count(node.input(2).shape[1]), build.op("Shape", index))
    if flags is not None:
        stay = build.op("Add", index, build.dim(count))
        slots = build.op("Where", build.op("Cast", flags, to=ir.DataType.BOOL), slots, stay)
    place = build.op("ScatterElements", place, index, slots, axis=1)
    if node.optional_input(3) is not None:
        place = build.op("ScatterElements", place, build.arg(node, 3), build.arg(node, 4), axis=1)
    return rows(build, build.op("Concat", y, x, axis=1), place)


RULES: tuple[Rule, ...] = (
    token_scores,
    token_blocks,
    token_select,
    token_match,
    token_take,
    token_merge,
    token_restore,
)
