"""Query and key projections of one attention, with nothing between them and it: narrower queries and keys.

The key projection of each key/value head, W_g [w, d], becomes U_g V_g of rank r. A score is q . U_g V_g x = (U_g^T q) .
V_g x: so the head's key is V_g x, of r numbers, and the projection of every query head h of g becomes U_g^T W_h. The
factor U costs nothing, and the cache holds r numbers of a key. What all keys have in common adds the same to all scores
of a query, which a softmax does not see: biases of keys go, and what their mean loses costs nothing. Where keys are
turned by their positions (rotary embedding) U cannot pass. MoDeGPT (arXiv 2408.09632) keeps some of the w numbers
instead, as it must where they are turned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context
from passes.low_rank.basis import Member
from passes.low_rank.metrics import Metrics
from passes.low_rank.places import Form, Place, bias_of
from passes.low_rank.rewrite import Stored
from passes.low_rank.shared import Shared, again, rebound
from passes.low_rank.values import SINKS, by_head, own_weight, pairs_of, saved_by_all


@dataclass(frozen=True)
class Scores:
    """The linear maps that queries and keys come from, and ``attention``; only ``split_heads`` is in between."""

    query: Node
    key: Node
    attention: Node

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads, and key/value heads."""
        return int(self.attention.input(0).shape[1]), int(self.attention.input(1).shape[1])


def scores_with(param: Param) -> Scores | None:
    """The scores that ``param`` makes queries or keys of; None where something else is between or beside."""
    node = param.single_user()
    split = node.output.single_user() if node is not None and node.op.name == "linear" else None
    attention = split.output.single_user() if split is not None and split.op.name == "split_heads" else None
    if attention is None or attention.op.name != "attention":
        return None
    if attention.optional_input(SINKS) is not None or attention.attr("softcap"):
        return None
    maps = [_map_of(attention, index) for index in (0, 1)]
    if maps[0] is None or maps[1] is None or node not in maps:
        return None
    return Scores(maps[0], maps[1], attention)


def _map_of(attention: Node, index: int) -> Node | None:
    split = attention.input(index).node
    if split is None or split.op.name != "split_heads" or split.output.users != {attention: 1}:
        return None
    node = split.input(0).node
    if node is None or node.op.name != "linear" or node.output.single_user() is not split:
        return None
    return node if own_weight(node) else None


class Keys(Shared):
    """``params`` are the weights of the key and of the query projection. A rank is the width of a key."""

    @property
    def scores(self) -> Scores:
        found = scores_with(self.params[0])
        assert found is not None
        return found

    @property
    def height(self) -> int:
        return self.scores.heads[1] * self.params[0].expr.shape[1]

    @cached_property
    def columns(self) -> int:
        return self.scores.heads[0] * self.params[1].expr.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.params[0].expr.shape[0], self.params[0].expr.shape[1]

    @property
    def most(self) -> int:
        return self.shape[0] // self.scores.heads[1]

    @property
    def full(self) -> int:
        return sum(param.type.numel for param in self.params)

    @property
    def words(self) -> str:
        return f"of each of {self.scores.heads[1]} heads, multiplied into {self.params[1].name}"

    @property
    def unbiased(self) -> int:
        return 0

    def members(self, metrics: Metrics) -> Iterator[Member]:
        """The key projection of each head."""
        return by_head(metrics, self.params[0], self.scores.heads[1], centred=True)

    def saved(self, metrics: Metrics) -> Tensor:
        return saved_by_all(self.members(metrics), self.most)

    def factorised(self, metrics: Metrics, rank: int) -> Stored:
        pairs, heads = pairs_of(self.members(metrics), rank), self.scores.heads[0]
        share, bias = heads // len(pairs), bias_of(self.params[1])
        turned = [pairs[head // share][0].T for head in range(heads)]

        def seen(tensor: Tensor) -> Tensor:
            return torch.cat([own @ part for own, part in zip(turned, tensor.double().chunk(heads), strict=True)])

        query = seen(metrics.ctx.read(self.params[1]))
        shifted = None if bias is None else seen(metrics.ctx.read(bias))
        return self._kept(metrics.ctx, torch.cat([right for _, right in pairs]), query, shifted)

    def planned(self, ctx: Context, form: Form, rank: int) -> Stored:
        ctx.read(self.params[0])
        heads, groups = self.scores.heads
        sizes = (groups * rank, self.params[0].expr.shape[1]), (heads * rank, self.params[1].expr.shape[1])
        key, query = (torch.empty(size, device="meta") for size in sizes)
        bias = None if bias_of(self.params[1]) is None else torch.empty(heads * rank, device="meta")
        return self._kept(ctx, key, query, bias)

    def _kept(self, ctx: Context, key: Tensor, query: Tensor, bias: Tensor | None) -> Stored:
        parts = {"keys": key, "queries": query} | ({} if bias is None else {"bias": bias})
        kept = [ctx.spill(f"{self.name}.{word}", part.to(self.params[0].storage)) for word, part in parts.items()]
        return NarrowKeys(kept[0], kept[1], None, kept[2] if bias is not None else None)


class NarrowKeys(Stored):
    """``first`` [groups r, d] makes the keys, ``second`` [heads r, d] and ``bias`` [heads r] the queries."""

    def write(self, graph: Graph, place: Place) -> None:
        scores = scores_with(graph.params[place.params[0].name])
        assert scores is not None
        made = zip(place.params, (self.first, self.second), strict=True)
        key, query = (rebound(graph, graph.params[param.name], expr) for param, expr in made)
        bias = scores.query.optional_input(2)
        if isinstance(bias, Param) and self.bias is not None:
            bias = rebound(graph, bias, self.bias)
        attention = scores.attention
        splits = [attention.input(index).node for index in (0, 1)]
        again(graph, scores.query, [scores.query.input(0), query, bias])
        again(graph, scores.key, [scores.key.input(0), key])
        for node in (*splits, attention):
            assert node is not None
            again(graph, node, node.inputs)
        graph.prune()
