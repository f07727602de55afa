"""Going on with fewer tokens: what says how much each matters, which remain, and how values follow.

Shapes in the docs: B batch, T tokens, K tokens that remain, R = T - K others, D width, H heads, G key heads, d head
width. Places of tokens are int64 and ascend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compiler.ir.opdef import Attr, OpDef, Types
from compiler.ir.ops.elementwise import axis_of, need
from compiler.ir.types import Dim, TensorType, canonical_dim, dim_sum


def _others(tokens: Dim, kept: Dim) -> Dim:
    if isinstance(tokens, int) and isinstance(kept, int):
        if not 1 <= kept <= tokens:
            raise ValueError(f"{kept} of {tokens} tokens cannot remain")
        return tokens - kept
    return canonical_dim(f"({tokens})-({kept})")


def _infer_scores(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    query, key = need(types[0]), need(types[1])
    if query.rank != 4 or key.rank != 4 or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"queries {query} do not fit keys {key}")
    if attrs["rows"] == "first" and attrs["causal"]:
        raise ValueError("the first of causal queries attends to its own key alone")
    return [key.with_shape((key.shape[0], key.shape[2]))]


def _eval_scores(query: Tensor, key: Tensor, *, rows: str, step: int, scale: float, causal: bool) -> Tensor:
    query = {"first": query[:, :, :1], "last": query[:, :, -1:]}.get(rows, query[:, :, ::step])
    batch, heads, count, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    scores = grouped @ key.transpose(-1, -2) * scale
    if causal and rows == "all":
        own = torch.arange(count, device=key.device) * step
        later = torch.arange(key.shape[2], device=key.device)[None] > own[:, None]
        scores = scores.masked_fill(later.repeat(heads // key.shape[1], 1), torch.finfo(scores.dtype).min)
    return scores.softmax(-1).mean((1, 2))


def _infer_blocks(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    if attrs["size"] < 1 or need(types[0]).rank != 2:
        raise ValueError(f"blocks of {attrs['size']} tokens are not those of {types[0]}")
    return [need(types[0])]


def _eval_blocks(scores: Tensor, *, size: int) -> Tensor:
    block = torch.arange(scores.shape[1], device=scores.device) // size
    count = int(block[-1]) + 1 if len(block) else 0
    total = scores.new_zeros(len(scores), count).index_add(1, block, scores)
    return (total / block.bincount(minlength=count))[:, block]


def _infer_select(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    batch, tokens = need(types[0]).shape
    kept = attrs["keep"]
    return [TensorType(torch.int64, (batch, count)) for count in (kept, _others(tokens, kept))]


def _eval_select(scores: Tensor, *, keep: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor]:
    place = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.masked_fill(place < prefix, torch.finfo(scores.dtype).max)
    scores = scores.masked_fill(place >= scores.shape[1] - suffix, torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :keep].sort(-1).values, order[:, keep:].sort(-1).values


def _infer_match(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    batch, tokens, _ = need(types[0]).shape
    rest, most = _others(tokens, attrs["keep"]), mergeable(tokens, attrs["prefix"], attrs["suffix"])
    if isinstance(rest, int) and isinstance(most, int) and rest > most:
        raise ValueError(f"{rest} of {tokens} tokens cannot be merged into others, {most} can")
    return [TensorType(torch.int64, (batch, count)) for count in (attrs["keep"], rest, rest)]


def mergeable(tokens: Dim, prefix: int, suffix: int) -> Dim:
    """How many of ``tokens`` can be merged into others at once: of a pair of neighbours, the second."""
    pairs = f"floor(({tokens}-{prefix + suffix})/2)"
    return canonical_dim(pairs if prefix + suffix <= 1 else f"Max(0,{pairs})")  # there is a token always


def _eval_match(metric: Tensor, *, keep: int, prefix: int, suffix: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = metric.shape
    if keep == tokens:
        index = torch.arange(tokens, device=metric.device).expand(batch, -1)
        return index, index[:, :0], index[:, :0]
    unit = F.normalize(metric[:, prefix : tokens - suffix], dim=-1)
    best, partner = (unit[:, 1::2] @ unit[:, ::2].transpose(1, 2)).max(-1)
    source = best.sort(dim=-1, descending=True, stable=True).indices[:, : tokens - keep]
    rest, target = prefix + 2 * source + 1, prefix + 2 * partner.gather(1, source)
    remains = torch.ones(batch, tokens, dtype=torch.int64, device=metric.device).scatter(1, rest, 0)
    slots = remains.cumsum(1) - 1
    index = remains.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
    return index, rest, slots.gather(1, target)


def _infer_take(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, index = need(types[0]), need(types[1])
    axis, (batch, kept) = axis_of(x, attrs["axis"]), index.shape
    if axis == 0 or x.shape[0] not in (1, batch):
        raise ValueError(f"{x} has no tokens along axis {axis} for places {index}")
    return [x.with_shape((batch, *x.shape[1:axis], kept, *x.shape[axis + 1 :]))]


def _eval_take(x: Tensor, index: Tensor, *, axis: int) -> Tensor:
    axis = axis % x.dim()
    x = x.expand(index.shape[0], *x.shape[1:])
    shape = [1] * x.dim()
    shape[0], shape[axis] = index.shape
    return x.gather(axis, index.reshape(shape).expand(*x.shape[:axis], index.shape[1], *x.shape[axis + 1 :]))


def _infer_merge(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, weight, index, rest, into = need(types[0]), need(types[1]), need(types[2]), need(types[3]), types[4]
    if weight.shape != x.shape[:2] or (into is not None and into.shape != rest.shape):
        raise ValueError(f"weights {weight} or slots {into} do not fit {x}")
    count = index.shape[1] if into is not None else dim_sum((index.shape[1], 1))
    return [x.with_shape((x.shape[0], count, x.shape[2])), weight.with_shape((x.shape[0], count))]


def _eval_merge(x: Tensor, weight: Tensor, index: Tensor, rest: Tensor, into: Tensor | None) -> tuple[Tensor, Tensor]:
    extra = 1 if into is None else 0
    slots = torch.full_like(rest, index.shape[1]) if into is None else into
    total = F.pad(weight.gather(1, index), (0, extra)).scatter_add(1, slots, weight.gather(1, rest))
    weighed = x * weight[..., None]
    kept = F.pad(_eval_take(weighed, index, axis=1), (0, 0, 0, extra))
    merged = kept.scatter_add(1, slots[..., None].expand(-1, -1, x.shape[2]), _eval_take(weighed, rest, axis=1))
    return merged / total[..., None], total


def _infer_restore(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, y, index = need(types[0]), need(types[1]), need(types[2])
    if (x.shape[0], *x.shape[2:]) != (y.shape[0], *y.shape[2:]) or index.shape[0] != x.shape[0]:
        raise ValueError(f"{y} at {index} does not fit {x}")
    return [x]


def _eval_restore(x: Tensor, y: Tensor, index: Tensor, rest: Tensor | None, into: Tensor | None) -> Tensor:
    width = x.shape[2]
    x = x.scatter(1, index[..., None].expand(-1, -1, width), y[:, : index.shape[1]])
    if rest is None or into is None:
        return x
    return x.scatter(1, rest[..., None].expand(-1, -1, width), _eval_take(y, into, axis=1))


def _taken_axes(operands: Types, results: Types, attrs: Mapping[str, Any]) -> str:
    x, result = need(operands[0]), need(results[0])
    names = [f"a{axis}" for axis in range(x.rank)]
    own, made = list(names), list(names)
    own[attrs["axis"] % x.rank], made[attrs["axis"] % x.rank] = "all!", "some!"
    if x.shape[0] != result.shape[0]:
        own[0], made[0] = "one!", "each!"
    return f"{' '.join(own)}, {made[0]} some! -> {' '.join(made)}"


_ENDS = {"prefix": Attr("int", 0), "suffix": Attr("int", 0)}

OPS: tuple[OpDef, ...] = (
    OpDef(
        "token_scores",
        "query key",
        _infer_scores,
        _eval_scores,
        {
            "rows": Attr("text", "all", ("first", "last", "all")),
            "step": Attr("int", 1),
            "scale": Attr("float"),
            "causal": Attr("bool", False),
        },
        axes="b h! t! d, b g! s! d -> b s!",
        doc="The attention [B, T] that each key gets, softmax(scale * q k^T), mean over heads and the first query, the "
        "last, or every `step`-th. query [B, H, T, d], key [B, G, T, d].",
    ),
    OpDef(
        "token_blocks",
        "scores",
        _infer_blocks,
        _eval_blocks,
        {"size": Attr("int")},
        axes="b t! -> b t!",
        doc="The mean score of the `size` neighbours that each token is one of, [B, T]; the last have fewer.",
    ),
    OpDef(
        "token_select",
        "scores",
        _infer_select,
        _eval_select,
        {"keep": Attr("dim"), **_ENDS},
        axes="b t! -> b k!, b r!",
        doc="The places [B, K] of the `keep` tokens with the largest scores [B, T], in order, and those [B, R] of the "
        "others. The last `suffix` tokens count as larger than any, then the first `prefix`.",
    ),
    OpDef(
        "token_match",
        "metric",
        _infer_match,
        _eval_match,
        {"keep": Attr("dim"), **_ENDS},
        axes="b t! d -> b k!, b r!, b r!",
        doc="Of the tokens between the first `prefix` and the last `suffix`, those at odd places nearest by cosine to "
        "one at an even place: the places [B, K] of all but T - `keep` of these, their own [B, R], and which of the K "
        "each is like (ToMe, arXiv 2210.09461). metric [B, T, d].",
    ),
    OpDef(
        "token_take",
        "x index",
        _infer_take,
        _eval_take,
        {"axis": Attr("int", 1)},
        axes=_taken_axes,
        doc="x at the places `index` [B, K] along `axis`, for each sample its own; x of one sample is that of all.",
    ),
    OpDef(
        "token_merge",
        "x weight index rest into?",
        _infer_merge,
        _eval_merge,
        axes="b t! d, b t!, b k!, b r!, b r!? -> b m! d, b m!",
        doc="The tokens of x [B, T, D] at `index` [B, K], each the mean by `weight` [B, T] of itself and those at "
        "`rest` that go `into` it, and their summed weights; without `into` one token more, the mean of all at `rest`.",
    ),
    OpDef(
        "token_restore",
        "x y index rest? into?",
        _infer_restore,
        _eval_restore,
        axes="b t! d, b k! d, b i!, b r!?, b r!? -> b t! d",
        doc="x [B, T, D] with y [B, K, D] at the places `index`, and at `rest` what these went `into`, if given.",
    ),
)
