"""Places whose matrices meet different inputs and get one first factor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from compiler.factor import Factors
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.pipeline import Context
from compiler.weights.expr import Expr
from passes.low_rank.basis import Basis, Member, basis, seconds
from passes.low_rank.forms import planned
from passes.low_rank.metrics import Metrics
from passes.low_rank.places import Form, Place, module_of
from passes.low_rank.rewrite import Stored, stored


class Shared(Place):
    """Factors are always a pair: the pivots of one input are no outputs of another."""

    pivots: ClassVar[bool] = False

    def members(self, metrics: Metrics) -> Iterator[Member]:
        """The matrices, one at a time."""
        for own in self.apart():
            yield Member(metrics.weight(own), metrics.of(own))

    def basis(self, metrics: Metrics) -> Basis:
        return basis(partial(self.members, metrics))

    def saved(self, metrics: Metrics) -> Tensor:
        """What each rank more saves, the first one first."""
        return self.basis(metrics).costs

    def factorised(self, metrics: Metrics, rank: int) -> Stored:
        """The factors of ``rank``, the second ones fitted to the first as it is stored."""
        first = self.basis(metrics).vectors[:rank].to(self.params[0].storage)
        return self.made(metrics, first, list(seconds(partial(self.members, metrics), first)))

    def made(self, metrics: Metrics, first: Tensor, second: Sequence[Tensor]) -> Stored:
        """The factors as they are kept, of V [r, n] and one U [m, r] of each matrix."""
        raise NotImplementedError

    def planned(self, ctx: Context, form: Form, rank: int) -> Stored:
        """What ``factorised`` keeps, without values."""
        return planned(ctx, form, self, rank)


class Adjacent(Shared):
    """Weights of a kind in adjacent layers, each of which applies the first factor to what it reads."""

    repeats: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return module_of(self.params[0].name)

    @property
    def words(self) -> str:
        return f"with one first factor for {' and '.join(own.name for own in self.apart())}"

    def made(self, metrics: Metrics, first: Tensor, second: Sequence[Tensor]) -> Stored:
        factors = Factors(first, torch.cat(list(second)).to(first.dtype))
        return stored(metrics.ctx.spill, self, factors, metrics.mended(self, factors.matrix()))


def rebound(graph: Graph, param: Param, expr: Expr) -> Param:
    """A parameter of another shape under the names of ``param``, whose users are to be written anew."""
    del graph.params[param.name]
    return graph.add_param(param.name, expr, param.storage, dtype=param.type.dtype, aliases=param.aliases)


def again(graph: Graph, node: Node, inputs: Sequence[Value | None]) -> Node:
    """The operation of ``node`` on other operands, in its place."""
    made = graph.append(node.op.name, inputs, node.attrs, scope=node.scope, before=node)
    for old, new in zip(node.outputs, made.outputs, strict=True):
        graph.replace(old, new)
    graph.erase(node)
    return made
