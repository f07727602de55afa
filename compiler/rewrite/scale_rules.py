"""How each operation passes on a change of scale. What is not listed lets none pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compiler.ir.graph import Node, Param, Value
from compiler.rewrite.equivariance import Ask, Blocked, Rule, Walk, sizes_of
from compiler.rewrite.labels import FREE


def passed(walk: Walk, node: Node) -> None:
    """Ask of all that ``node`` reads and makes what follows from what is asked of some of it.

    Raises Blocked when the operation does not let a scale pass.
    """
    rule = RULES.get(node.op.name)
    if rule is None:
        raise Blocked(_refusal(node))
    rule(walk, node)


def choices(walk: Walk, node: Node) -> list[Value]:
    """The factors of a product of which one must carry what is asked of it; weights first. Empty when it is settled."""
    if node.op.name != "mul" or len(node.inputs) < 2 or walk.of(node.outputs[0]) is None:
        return []
    factors = [value for value in node.inputs if value is not None]
    if len(set(factors)) < 2 or any(walk.of(value) for value in factors) or walk.rotations:
        return []
    return sorted(factors, key=lambda value: not isinstance(value, Param))


def _refusal(node: Node) -> str:
    return f"`{node.op.name}` in `{node.scope}` does not let a scale pass"


def _scaled(walk: Walk, node: Node) -> None:
    """Of operations that multiply every element by one number, which the attributes say."""
    _power(walk, node, 1.0)


def _homogeneous(walk: Walk, node: Node) -> None:
    _no_rotation(walk, node)
    _power(walk, node, 1.0)


def _power(walk: Walk, node: Node, degree: float) -> None:
    """Of f(s x) = s^degree f(x), element by element."""
    if (ask := walk.of(node.input(0))) is not None:
        walk.ask(node.output, ask[0], ask[1] * degree)
    if (ask := walk.of(node.output)) is not None:
        walk.ask(node.input(0), ask[0], ask[1] / degree)


def _no_rotation(walk: Walk, node: Node) -> None:
    if walk.rotations:
        raise Blocked(_refusal(node))


def _pow(walk: Walk, node: Node) -> None:
    _no_rotation(walk, node)
    if not node.attr("scalar"):
        raise Blocked(_refusal(node))
    _power(walk, node, node.attr("scalar"))


def _root(walk: Walk, node: Node) -> None:
    _no_rotation(walk, node)
    _power(walk, node, 0.5 if node.op.name == "sqrt" else -0.5)


def _sum(walk: Walk, node: Node) -> None:
    """Of x + y: both and the sum have one scale."""
    operands = [value for value in node.inputs if value is not None]
    if len(operands) < 2 and node.attr("scalar"):
        raise Blocked(f"`{node.op.name}` in `{node.scope}` takes a number that is not scaled")
    _same(walk, node, operands)


def _same(walk: Walk, node: Node, operands: Sequence[Value]) -> None:
    """Operands that were broadcast, and the result, have one scale."""
    for value in operands:
        if (ask := walk.of(value)) is not None:
            walk.ask(node.output, _broadcast(ask[0], node.output), ask[1])
    if (ask := walk.of(node.output)) is not None:
        for value in operands:
            walk.ask(value, walk.labels.fitted(ask[0], sizes_of(value)), ask[1])


def _broadcast(labels: Tensor, result: Value) -> Tensor:
    return labels.reshape(*[1] * (result.type.rank - labels.ndim), *labels.shape)


def _bound(walk: Walk, node: Node) -> None:
    _no_rotation(walk, node)
    _sum(walk, node)


def _where(walk: Walk, node: Node) -> None:
    if walk.of(node.input(0)) is not None:
        raise Blocked(_refusal(node))
    _no_rotation(walk, node)
    _same(walk, node, node.inputs[1:])  # pyright: ignore[reportArgumentType]


def _product(walk: Walk, node: Node) -> None:
    """Of x y and x / y: exponents add up. Where only the product is asked, ``choices`` come before this."""
    operands = [value for value in node.inputs if value is not None]
    if len(operands) < 2:
        _power(walk, node, 1.0)
        return
    _no_rotation(walk, node)
    if operands[0] is not operands[1]:
        _factors(walk, node, operands)
    elif node.op.name == "mul":
        _power(walk, node, 2.0)
    else:
        raise Blocked(_refusal(node))


def _factors(walk: Walk, node: Node, operands: Sequence[Value]) -> None:
    sign = -1.0 if node.op.name == "div" else 1.0
    left, right, result = (walk.of(value) for value in (*operands, node.output))
    if result is None:
        parts = [(ask[0], ask[1] * by) for ask, by in ((left, 1.0), (right, sign)) if ask is not None]
        for labels, _ in parts[1:]:
            walk.labels.joined(labels, parts[0][0])
        walk.ask(node.output, _broadcast(parts[0][0], node.output), sum(exponent for _, exponent in parts))
    elif left is None and (right is None or result[1] != right[1] * sign):
        _ask_rest(walk, operands[0], result, (right[1] * sign) if right else 0.0)
    elif right is None and left is not None and result[1] != left[1]:
        _ask_rest(walk, operands[1], (result[0], result[1] * sign), left[1] * sign)
    elif (left[1] if left else 0.0) + (right[1] * sign if right else 0.0) != result[1]:
        raise Blocked(f"`{node.op.name}` in `{node.scope}` multiplies what is scaled otherwise")


def _ask_rest(walk: Walk, value: Value, result: Ask, other: float) -> None:
    walk.ask(value, walk.labels.fitted(result[0], sizes_of(value)), result[1] - other)


def _reduced(walk: Walk, node: Node) -> None:
    """Of sums over axes: elements that are added have one scale."""
    x, axes = node.input(0), [axis % node.input(0).type.rank for axis in node.attr("axes")]
    if node.op.name == "max":
        _no_rotation(walk, node)
    if (ask := walk.of(x)) is not None:
        labels = walk.labels.alike(ask[0], axes)
        walk.ask(node.output, labels if node.attr("keep") else labels.squeeze(axes), ask[1])
    if (ask := walk.of(node.output)) is not None:
        labels = ask[0]
        for axis in sorted(axes) if not node.attr("keep") else ():
            labels = labels.unsqueeze(axis)
        walk.ask(x, labels, ask[1])


def _moved(walk: Walk, node: Node) -> None:
    """Of operations that move elements: where each comes from is seen by moving numbers."""
    operands = [value for value in node.inputs if value is not None]
    sources, start = [], 0
    for value in operands:
        sizes = sizes_of(value)
        count = torch.Size(sizes).numel()
        sources.append(torch.arange(start, start + count).reshape(sizes))
        start += count
    origin = _run(node, sources)
    flat = torch.full((start,), FREE)
    for value, source in zip(operands, sources, strict=True):
        if (ask := walk.of(value)) is not None:
            flat[source.flatten()] = ask[0].expand(source.shape).flatten()
            walk.ask(node.output, _taken(walk, flat, origin), ask[1])
    if (ask := walk.of(node.output)) is not None:
        flat = _returned(walk, ask[0], origin, start)
        for value, source in zip(operands, sources, strict=True):
            walk.ask(value, flat[source], ask[1])


def _taken(walk: Walk, flat: Tensor, origin: Tensor) -> Tensor:
    return walk.labels.resolved(flat)[origin]


def _returned(walk: Walk, labels: Tensor, origin: Tensor, count: int) -> Tensor:
    """The labels of ``count`` elements of which ``origin`` were moved to where ``labels`` are asked."""
    wanted, places = labels.expand(origin.shape).flatten(), origin.flatten()
    flat = torch.full((count,), FREE).scatter_reduce(0, places, wanted, "amax")
    walk.labels.merge(wanted, flat[places])
    return walk.labels.resolved(flat)


def _run(node: Node, operands: Sequence[Tensor]) -> Tensor:
    """What the operation makes of ``operands``, in which symbolic axes have size 1."""
    if node.op.name == "cast":
        return operands[0]
    attrs: dict[str, Any] = node.op.all_attrs(node.attrs)
    if "shape" in attrs:
        attrs["shape"] = tuple(sizes_of(node.output))
    if node.op.name == "slice" and isinstance(node.input(0).shape[attrs["axis"]], str):
        return operands[0]
    try:
        return node.op.eval(*operands, **attrs)
    except RuntimeError as reason:
        raise Blocked(f"`{node.op.name}` in `{node.scope}` mixes axes whose size the inputs tell") from reason


def _norm(walk: Walk, node: Node) -> None:
    """Of norms: what they average over has no scale; what they yield is scaled by their weight and shift."""
    _no_rotation(walk, node)
    weight, shift = node.optional_input(1), node.optional_input(2)
    if walk.of(node.input(0)) is not None:
        raise Blocked(f"`{node.op.name}` in `{node.scope}` averages over it")
    for value in (weight, shift):
        if (ask := walk.of(value)) is not None:
            walk.ask(node.output, _broadcast(ask[0], node.output), ask[1])
    if (ask := walk.of(node.output)) is not None:
        if weight is None:
            raise Blocked(f"`{node.op.name}` in `{node.scope}` has no scale of its own")
        width = sizes_of(node.output)[-1:]
        for value in (weight, shift):
            walk.ask(value, walk.labels.fitted(ask[0], width), ask[1])


def _vector(walk: Walk, labels: Tensor, axis: int) -> Tensor:
    """Labels that differ along one axis alone."""
    return walk.labels.alike(labels, [i for i in range(labels.ndim) if i != axis % labels.ndim]).flatten()


def _linear(walk: Walk, node: Node) -> None:
    """Of linear maps and convolutions: the weight takes both what is read and what is written."""
    axis = 1 if node.op.name == "conv" else -1
    if node.op.name == "conv" and node.attr("groups") != 1:
        raise Blocked(_refusal(node))
    _own_weight(walk, node, 1)
    rest = [1] * (node.input(1).type.rank - 2)
    bias = node.optional_input(2)
    if (ask := walk.of(bias)) is not None:
        walk.ask(node.output, _across(ask[0], node.output, axis), ask[1])
    if (ask := walk.of(node.input(0))) is not None:
        walk.take(node, 1, 1, _vector(walk, ask[0], axis).reshape(1, -1, *rest), -ask[1], reads=True)
    if (ask := walk.of(node.output)) is not None:
        rows = _vector(walk, ask[0], axis)
        walk.take(node, 1, 0, rows.reshape(-1, 1, *rest), ask[1], reads=False)
        walk.ask(bias, rows, ask[1])


def _own_weight(walk: Walk, node: Node, *operands: int) -> None:
    """Weights of products must not be scaled because of something else that reads them."""
    for index in operands:
        value = node.optional_input(index)
        if value is not None and walk.of(value) is not None:
            raise Blocked(f"{value.name} is shared with `{node.op.name}` in `{node.scope}`")


def _across(vector: Tensor, value: Value, axis: int) -> Tensor:
    shape = [1] * value.type.rank
    shape[axis] = -1
    return vector.reshape(shape)


def _embedding(walk: Walk, node: Node) -> None:
    table = node.input(0)
    if (ask := walk.of(table)) is not None:
        walk.ask(node.output, _across(_vector(walk, ask[0], -1), node.output, -1), ask[1])
    if (ask := walk.of(node.output)) is not None:
        walk.ask(table, _vector(walk, ask[0], -1)[None], ask[1])


def _attention(walk: Walk, node: Node) -> None:
    """Of attention: values [B, G, S, v] pass their scale to the result [B, T, H, v]; heads of a group share it."""
    value = node.input(2)
    others = (operand for operand in node.inputs if operand is not value)
    if any(walk.of(operand) for operand in others):
        raise Blocked(f"`{node.op.name}` in `{node.scope}` compares it")
    groups, heads, width = sizes_of(value)[1], sizes_of(node.output)[2], sizes_of(value)[3]
    share = heads // groups
    if (ask := walk.of(value)) is not None:
        labels = walk.labels.alike(ask[0], (0, 2)).expand(1, groups, 1, width)
        walk.ask(node.output, labels.repeat_interleave(share, 1).transpose(1, 2), ask[1])
    if (ask := walk.of(node.output)) is not None:
        labels = walk.labels.alike(ask[0], (0, 1)).expand(1, 1, heads, width).reshape(groups, share, width)
        rows = walk.labels.alike(labels, (1,))[:, 0]
        walk.heads = rows
        walk.ask(value, rows[None, :, None], ask[1])


def _latent_attention(walk: Walk, node: Node) -> None:
    """Of latent attention: the up-projection's value rows take what is asked of the result, its columns latents."""
    query, latent, rotary = (node.optional_input(index) for index in range(3))
    if walk.of(query) is not None or walk.of(rotary) is not None:
        raise Blocked(f"`{node.op.name}` in `{node.scope}` compares it")
    _own_weight(walk, node, 3)
    if (ask := walk.of(latent)) is not None:
        walk.take(node, 3, 1, _vector(walk, ask[0], -1)[None], -ask[1], reads=True)
    if (ask := walk.of(node.output)) is not None:
        heads, width = sizes_of(node.output)[2:]
        rows = walk.labels.alike(ask[0], (0, 1)).expand(1, 1, heads, width)[0, 0]
        keys = sizes_of(node.input(3))[0] // heads - width
        whole = torch.cat((torch.full((heads, keys), FREE), rows), 1)
        walk.heads = rows
        walk.take(node, 3, 0, whole.reshape(-1, 1), ask[1], reads=False)


def _experts(walk: Walk, node: Node) -> None:
    """Of experts: the first matrices take what is read, the second ones and their biases what is written."""
    if walk.of(node.optional_input(2)) is not None:
        raise Blocked(_refusal(node))
    bias = node.optional_input(6)
    _own_weight(walk, node, 3, 4, 5, *([] if walk.of(node.output) else [6]))
    if (ask := walk.of(node.input(0))) is not None:
        walk.take(node, 3, 2, _vector(walk, ask[0], -1)[None, None], -ask[1], reads=True)
    if (ask := walk.of(node.output)) is not None:
        rows = _vector(walk, ask[0], -1)
        walk.take(node, 4, 1, rows[None, :, None], ask[1], reads=False)
        walk.ask(bias, rows[None], ask[1])


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(
        ("cast", "reshape", "transpose", "slice", "concat", "expand", "split_heads", "merge_heads"), _moved
    ),
    **dict.fromkeys(("relu", "abs"), _homogeneous),
    **dict.fromkeys(("sqrt", "rsqrt"), _root),
    **dict.fromkeys(("minimum", "maximum"), _bound),
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("mul", "div"), _product),
    **dict.fromkeys(("sum", "mean", "max"), _reduced),
    **dict.fromkeys(("rms_norm", "layer_norm"), _norm),
    **dict.fromkeys(("linear", "conv"), _linear),
    "neg": _scaled,
    "pow": _pow,
    "where": _where,
    "embedding": _embedding,
    "attention": _attention,
    "latent_attention": _latent_attention,
    "experts": _experts,
}
