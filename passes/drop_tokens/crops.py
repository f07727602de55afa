"""How much each picture of a sample may keep, where one is of the whole and the others are crops of it.

By what the class token of the whole picture attends to (GlobalCom2, arXiv 2501.05179): the crops where much of that
lies keep more of their tokens, and all pictures together as many as without.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt

import torch
from torch.nn import functional as F

from compiler.errors import PassError
from compiler.ir.graph import Param, Value
from compiler.ir.types import Dim
from compiler.weights.ops.basic import literal
from passes.drop_tokens.scores import Ops


def shared(ops: Ops, attention: Value, batch: Dim, crops: Sequence[int]) -> Value:
    """Scores [B, P, N] whose largest are as many of each picture as it may keep, however many those are.

    ``attention`` [B * P, N] is what class tokens pay to the N tokens of their pictures, of the whole one and of its
    ``crops``, so many rows of so many. A crop weighs 1 + s - 1 / C, s being its share of what the whole picture pays to
    all C of them; within it tokens go by the sum of both attentions, each of length 1. The n-th of a picture of weight
    w scores w / (n - 1/2): parts are nearest to weights (Sainte-Lague), and sum up to what is asked for.

    Raises PassError where there are not as many pictures, or they are not square.
    """
    pictures, tokens = crops[0] * crops[1] + 1, attention.shape[1]
    if not isinstance(tokens, int) or isqrt(tokens) ** 2 != tokens:
        raise PassError(
            f"the {tokens} tokens of a picture are not those of a square one",
            option="crops",
            remedy="leave out `crops`",
        )
    own = ops("reshape", attention, shape=(batch, pictures, tokens))
    whole = ops("slice", own, axis=1, stop=1)
    seen = _enlarged(ops, whole, isqrt(tokens), crops)
    looked = ops("sum", seen, axes=(2,), keep=True)
    share = ops("div", looked, ops("sum", looked, axes=(1,), keep=True))
    one = ops("full", shape=(batch, 1, 1), value=1.0)
    weight = ops("concat", one, ops("add", share, scalar=1 - 1 / (pictures - 1)), axis=1)
    local = _unit(ops, ops("slice", own, axis=1, start=1, stop=pictures))
    scores = ops("concat", whole, ops("add", local, _unit(ops, seen)), axis=1)
    return ops("div", weight, ops("add", _before(ops, scores, (batch, pictures, tokens)), scalar=0.5))


def _enlarged(ops: Ops, whole: Value, side: int, crops: Sequence[int]) -> Value:
    """What ``whole`` [B, 1, N] says of each token of its crops, [B, C, N]: linear between its own, along both axes."""
    batch, (rows, columns) = whole.shape[0], crops
    wide = ops("linear", ops("reshape", whole, shape=(batch, side, side)), _between(ops, side, columns))
    turned = ops("transpose", wide, perm=(0, 2, 1))
    high = ops("linear", turned, _between(ops, side, rows))
    parts = ops("reshape", high, shape=(batch, columns, side, rows, side))
    ordered = ops("transpose", parts, perm=(0, 3, 1, 4, 2))
    return ops("reshape", ordered, shape=(batch, rows * columns, side * side))


def _between(ops: Ops, side: int, times: int) -> Param:
    """What makes ``times`` as many of ``side`` numbers in a row, [times * side, side]."""
    name = f"constants.enlarged_{side}_{times}"
    if name in ops.graph.params:
        return ops.graph.params[name]
    value = F.interpolate(torch.eye(side)[None], size=times * side, mode="linear")[0].T
    return ops.graph.add_param(name, literal(value.flatten().tolist(), value.shape), persistent=False)


def _unit(ops: Ops, rows: Value) -> Value:
    """``rows`` [B, C, N], each divided by its length."""
    return ops("div", rows, ops("sqrt", ops("sum", ops("mul", rows, rows), axes=(2,), keep=True)))


def _before(ops: Ops, scores: Value, shape: Sequence[Dim]) -> Value:
    """How many tokens of the same picture score higher than each of ``scores`` [B, P, N]."""
    batch, pictures, tokens = shape
    others = ops("reshape", scores, shape=(batch, pictures, 1, tokens))
    higher = ops("compare", others, ops("reshape", scores, shape=(*shape, 1)), relation="gt")
    return ops("sum", ops("cast", higher, dtype=torch.float32), axes=(3,))
