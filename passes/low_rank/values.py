"""Value and output projections of one attention: narrower values, with nothing between them.

The value projection of each key/value head, W_g [v, d], becomes U_g V_g of rank r. What attention makes of U_g V_g x is
U_g times what it makes of V_g x, as it mixes tokens with the same weights in all elements of a value. So the head's
value is V_g x, of r numbers, and the output projection's columns for every query head h of g are W_h U_g: the factor U
costs nothing, and the cache holds r numbers of a value. Weights that add up to one pass a constant through: what the
value projection adds, and what its mean loses, goes into the output projection's bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from compiler.factor import Metric, spectrum, truncated
from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context
from passes.low_rank.basis import Member
from passes.low_rank.metrics import Metrics
from passes.low_rank.places import Form, Place, bias_of, module_of
from passes.low_rank.rewrite import Stored
from passes.low_rank.shared import Shared, again, rebound

SINKS = 5  # operand of `attention`: with it, weights add up to less than one


@dataclass(frozen=True)
class Chain:
    """The nodes from the value projection to the output projection, each of which only the next one reads."""

    value: Node
    split: Node
    attention: Node
    merge: Node
    output: Node

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads, and key/value heads."""
        return int(self.attention.input(0).shape[1]), int(self.attention.input(2).shape[1])


def chain_of(attention: Node) -> Chain | None:
    """The chain through ``attention``; None where something else is between or beside."""
    split, merge = attention.input(2).node, attention.output.single_user()
    value = split.input(0).node if split is not None and split.op.name == "split_heads" else None
    output = merge.output.single_user() if merge is not None and merge.op.name == "merge_heads" else None
    if split is None or value is None or merge is None or output is None or attention.optional_input(SINKS) is not None:
        return None
    found = Chain(value, split, attention, merge, output)
    alone = all(node.output.single_user() is not None for node in (value, split))
    linear = all(node.op.name == "linear" and own_weight(node) for node in (value, output))
    return found if alone and linear and split.output.users == {attention: 1} else None


def chain_with(param: Param) -> Chain | None:
    """The chain that ``param`` is the first or the last weight of."""
    node = param.single_user()
    if node is None or node.op.name != "linear":
        return None
    split, merge = node.output.single_user(), node.input(0).node
    below = split.output.single_user() if split is not None and split.op.name == "split_heads" else None
    above = merge.input(0).node if merge is not None and merge.op.name == "merge_heads" else None
    for attention in (below, above):
        chain = chain_of(attention) if attention is not None and attention.op.name == "attention" else None
        if chain is not None and param in (chain.value.input(1), chain.output.input(1)):
            return chain
    return None


class Values(Shared):
    """``params`` are the weights of the value and of the output projection. A rank is the width of a value."""

    @property
    def chain(self) -> Chain:
        chain = chain_with(self.params[0])
        assert chain is not None
        return chain

    @property
    def height(self) -> int:
        return self.chain.heads[1] * self.params[0].expr.shape[1]

    @cached_property
    def columns(self) -> int:
        return self.chain.heads[0] * self.params[1].expr.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.params[0].expr.shape[0], self.params[0].expr.shape[1]

    @property
    def most(self) -> int:
        return self.shape[0] // self.chain.heads[1]

    @property
    def full(self) -> int:
        return sum(param.type.numel for param in self.params)

    @property
    def words(self) -> str:
        return f"of each of {self.chain.heads[1]} heads, multiplied into {self.params[1].name}"

    @property
    def unbiased(self) -> int:
        return 0 if bias_of(self.params[1]) else self.params[1].expr.shape[0]

    def members(self, metrics: Metrics) -> Iterator[Member]:
        """The value projection of each head."""
        return by_head(metrics, self.params[0], self.chain.heads[1], metrics.centred)

    def saved(self, metrics: Metrics) -> Tensor:
        return saved_by_all(self.members(metrics), self.most)

    def factorised(self, metrics: Metrics, rank: int) -> Stored:
        members = list(self.members(metrics))
        pairs = pairs_of(members, rank)
        values = torch.cat([right for _, right in pairs])
        outputs = metrics.ctx.read(self.params[1]).double().chunk(self.chain.heads[0], 1)
        share, lost = len(outputs) // len(pairs), self._lost(metrics, members, pairs)
        narrow = torch.cat([part @ pairs[head // share][0] for head, part in enumerate(outputs)], 1)
        added = torch.stack([part @ lost[head // share] for head, part in enumerate(outputs)]).sum(0)
        return self._kept(metrics.ctx, values, narrow, self._bias(metrics, added))

    def _lost(
        self, metrics: Metrics, members: Sequence[Member], pairs: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Tensor]:
        """What has to be added to the value of each head [v]: its bias, and what its mean loses."""
        mean, bias = metrics.statistics.of(self.params[0]).mean, bias_of(self.params[0])
        width = len(members[0].weight)
        added = (
            torch.zeros(width * len(members), dtype=torch.float64) if bias is None else metrics.ctx.read(bias).double()
        )
        lost = [(one.weight - left @ right) @ mean for one, (left, right) in zip(members, pairs, strict=True)]
        return [own + (part if metrics.centred else 0) for own, part in zip(added.split(width), lost, strict=True)]

    def _bias(self, metrics: Metrics, added: Tensor) -> Tensor | None:
        bias = bias_of(self.params[1])
        if bias is None and bias_of(self.params[0]) is None and not metrics.centred:
            return None
        return added + (0 if bias is None else metrics.ctx.read(bias).double())

    def planned(self, ctx: Context, form: Form, rank: int) -> Stored:
        ctx.read(self.params[0])
        heads, groups = self.chain.heads
        width, columns = self.params[1].expr.shape[0], self.params[0].expr.shape[1]
        biased = form.bias or any(bias_of(param) for param in self.params)
        sizes = (groups * rank, columns), (width, heads * rank), (width,)
        values, output, bias = (torch.empty(size, device="meta") for size in sizes)
        return self._kept(ctx, values, output, bias if biased else None)

    def _kept(self, ctx: Context, values: Tensor, output: Tensor, bias: Tensor | None) -> Stored:
        parts = {"values": values, "output": output} | ({} if bias is None else {"bias": bias})
        kept = [ctx.spill(f"{self.name}.{word}", part.to(self.params[0].storage)) for word, part in parts.items()]
        return NarrowValues(kept[0], kept[1], None, kept[2] if bias is not None else None)


class NarrowValues(Stored):
    """``first`` [groups r, d] makes the values, ``second`` [out, heads r] reads them and adds ``bias`` [out]."""

    def write(self, graph: Graph, place: Place) -> None:
        chain = chain_with(graph.params[place.params[0].name])
        assert chain is not None
        made = zip(place.params, (self.first, self.second), strict=True)
        value, output = (rebound(graph, graph.params[param.name], expr) for param, expr in made)
        bias, old = None, chain.output.optional_input(2)
        if self.bias is not None and isinstance(old, Param):
            bias = rebound(graph, old, self.bias)
        elif self.bias is not None:
            bias = graph.add_param(f"{module_of(output.name)}.bias", self.bias)
        again(graph, chain.value, [chain.value.input(0), value])
        for node in (chain.split, chain.attention, chain.merge):
            again(graph, node, node.inputs)
        again(graph, chain.output, [chain.output.input(0), output, bias])
        graph.prune()


def by_head(metrics: Metrics, param: Param, heads: int, centred: bool) -> Iterator[Member]:
    """The matrix of each head that ``param`` makes; errors of different heads are taken to be independent."""
    found = metrics.statistics.of(param)
    for index, weight in enumerate(metrics.ctx.read(param).double().chunk(heads)):
        part = slice(index * len(weight), (index + 1) * len(weight))
        gradient = found.gradient
        if gradient is not None:
            gradient = gradient[part, part] if gradient.ndim == 2 else gradient[part]
        yield Member(weight, Metric((metrics.left(gradient, len(weight)),), metrics.right(found, centred)))


def saved_by_all(members: Iterable[Member], most: int) -> Tensor:
    """What each rank more of all ``members`` at once saves [most]."""
    return torch.stack([spectrum(one.weight, one.metric).costs[:most] for one in members]).sum(0)


def pairs_of(members: Iterable[Member], rank: int) -> list[tuple[Tensor, Tensor]]:
    """U and V of ``rank`` of each of ``members``."""
    return [truncated(one.weight, one.metric, spectrum(one.weight, one.metric), rank) for one in members]


def own_weight(node: Node) -> bool:
    """Whether the linear map ``node`` alone reads its weight, and its bias is a parameter."""
    weight, bias = node.input(1), node.optional_input(2)
    return isinstance(weight, Param) and len(weight.users) == 1 and (bias is None or isinstance(bias, Param))
