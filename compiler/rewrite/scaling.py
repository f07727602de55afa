"""Scaling and turning the channels of a value: what every weight of its region becomes, as lazy expressions."""

from __future__ import annotations

import torch

from compiler.ir.graph import Param
from compiler.rewrite.equivariance import FREE, Blocked, Factor, Region
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import (
    add,
    cast,
    concat,
    div,
    full,
    index,
    matmul,
    mul,
    reshape,
    slice,
    sub,
    transpose,
)


def divide(region: Region, scales: Expr) -> None:
    """Divide the value of ``region`` by ``scales`` [size], float64, and all else as that asks.

    Raises Blocked for exponents other than whole numbers.
    """
    padded = concat([scales, full((1,), 1.0, torch.float64)], 0)
    wanted = {param: [_vector(padded, factor) for factor in own] for param, own in region.factors.items()}
    for param, vectors in wanted.items():
        param.expr = _times(param, vectors)


def _vector(padded: Expr, factor: Factor) -> Expr:
    """s[label]^exponent for every label, in the shape of the labels."""
    size = padded.shape[0] - 1
    places = torch.where(factor.labels == FREE, size, factor.labels).flatten().tolist()
    picked = reshape(index(padded, 0, places), tuple(factor.labels.shape))
    power = full(picked.shape, 1.0, torch.float64)
    if factor.exponent != int(factor.exponent):
        raise Blocked("it would take roots of scales")
    for _ in range(abs(int(factor.exponent))):
        power = mul(power, picked) if factor.exponent > 0 else div(power, picked)
    return power


def _times(param: Param, vectors: list[Expr]) -> Expr:
    """The weight times ``vectors``; a norm's, which is added to a number before it multiplies, with that number."""
    value, offset = cast(param.expr, torch.float64), _offset(param)
    if offset:
        value = add(value, full(value.shape, offset, torch.float64))
    for vector in vectors:
        value = mul(value, vector)
    return sub(value, full(value.shape, offset, torch.float64)) if offset else value


def _offset(param: Param) -> float:
    norms = [node for node in param.users if "offset" in node.op.attrs and node.optional_input(1) is param]
    offsets = {node.attr("offset") for node in norms}
    if len(offsets) > 1:
        raise Blocked(f"{param.name} is the scale of norms that read it differently")
    return offsets.pop() if offsets else 0.0


def turn_heads(region: Region, basis: Expr) -> None:
    """Turn every head of the value of ``region`` by ``basis`` [width, width], float64 and orthogonal.

    Raises Blocked when a weight holds a part of a head.
    """
    made = {param: _turned(param, own, region, basis) for param, own in region.factors.items()}
    for param, expr in made.items():
        param.expr = expr


def _turned(param: Param, factors: tuple[Factor, ...], region: Region, basis: Expr) -> Expr:
    expr = cast(param.expr, torch.float64)
    for factor in factors:
        (axis,) = [axis for axis, size in enumerate(factor.labels.shape) if size > 1]
        order, turned = _order(factor, region)
        expr = _along(expr, axis, order, turned, basis)
    return expr


def _order(factor: Factor, region: Region) -> tuple[list[int], int]:
    """The positions of an axis, those of whole heads first, each in the order of its labels; how many these are."""
    labels, width = factor.labels.flatten().tolist(), region.heads.shape[1]
    places: dict[int, list[int]] = {}
    for place, label in enumerate(labels):
        places.setdefault(label, []).append(place)
    order: list[int] = []
    for head in region.heads.tolist():
        copies = [places.get(label, []) for label in head]
        if len({len(own) for own in copies}) > 1:
            raise Blocked("a weight holds a part of a head")
        order += [own[copy] for copy in range(len(copies[0])) for own in copies]
    rest = places.get(FREE, [])
    if len(order) % width or len(order) + len(rest) != len(labels):
        raise Blocked("a weight holds a part of a head")
    return [*order, *rest], len(order)


def _along(expr: Expr, axis: int, order: list[int], turned: int, basis: Expr) -> Expr:
    """Vectors along ``axis``, heads of which are in the first ``turned`` of ``order``, times ``basis``."""
    rank, width, size = expr.type.rank, basis.shape[0], expr.shape[axis]
    perm = [*(i for i in range(rank) if i != axis), axis]
    last = _picked(transpose(expr, perm), order)
    heads = reshape(slice(last, rank - 1, 0, turned), (-1, width))
    made = reshape(matmul(heads, basis), (*last.shape[:-1], turned))
    whole = concat([made, slice(last, rank - 1, turned, size)], rank - 1) if turned < size else made
    back = [0] * size
    for place, origin in enumerate(order):
        back[origin] = place
    return transpose(_picked(whole, back), [perm.index(i) for i in range(rank)])


def _picked(expr: Expr, order: list[int]) -> Expr:
    return expr if order == list(range(len(order))) else index(expr, expr.type.rank - 1, order)
