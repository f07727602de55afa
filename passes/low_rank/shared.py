"""Places whose matrices meet different inputs and get one first factor; and which weights share one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import Layer, layer_of
from compiler.pipeline import Context
from compiler.weights.expr import Expr
from passes.low_rank.basis import Basis, Member, basis, seconds
from passes.low_rank.factor import Factors
from passes.low_rank.metrics import Metrics
from passes.low_rank.places import Form, Place, module_of
from passes.low_rank.rewrite import Stored, planned, stored


class Shared(Place):
    """Factors are always a pair: the pivots of one input are no outputs of another."""

    pivots: ClassVar[bool] = False

    def members(self, metrics: Metrics) -> Iterator[Member]:
        """The matrices, one at a time."""
        for own in self.apart():
            yield Member(metrics.weight(own), metrics.of(own))

    def basis(self, metrics: Metrics) -> Basis:
        return basis(partial(self.members, metrics))

    def factorised(self, metrics: Metrics, rank: int) -> Stored:
        """The factors of ``rank``, the second ones fitted to the first as it is stored."""
        first = self.basis(metrics).vectors[:rank].to(self.params[0].storage)
        return self.made(metrics, first, list(seconds(partial(self.members, metrics), first)))

    def made(self, metrics: Metrics, first: Tensor, second: Sequence[Tensor]) -> Stored:
        """The factors as they are kept, of V [r, n] and one U [m, r] of each matrix."""
        raise NotImplementedError

    def planned(self, ctx: Context, form: Form, rank: int) -> Stored:
        """What ``factorised`` keeps, without values."""
        return planned(ctx, self, form, rank)


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
        return stored(metrics.ctx.spill, self, factors, metrics.mended(self, factors))


def sharing(places: Sequence[Place], share: str) -> list[list[Place]]:
    """``places`` in groups that may share a first factor; one that shares none is alone.

    ``share``: `none`; `input`, linear maps of one use and one layer that read the same value; `layers`, such of the
    same name and shape in two layers that follow each other.
    """
    found: dict[object, list[Place]] = {}
    for place in places:
        found.setdefault(_shared(place, share) or place, []).append(place)
    return list(found.values())


def _shared(place: Place, share: str) -> object:
    """Equal for places that may share; None for one that shares with none."""
    if type(place) is not Place:
        return None
    (param,) = place.params
    node = param.single_user()
    if share == "none" or node is None or node.op.name != "linear":
        return None
    layer = layer_of(param.name)
    if share == "input":
        return node.input(0), layer
    return layer and (Layer(layer.stack, layer.index // 2), param.name.removeprefix(layer.scope), param.type)


def together(group: Sequence[Place]) -> Place:
    """The weights of ``group`` as one place."""
    if len(group) == 1:
        return group[0]
    params = tuple(param for place in group for param in place.params)
    return Place(params) if len({layer_of(param.name) for param in params}) == 1 else Adjacent(params)


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
