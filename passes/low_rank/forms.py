"""Forms of factors: what stands in the place of a matrix, and how it is kept.

A pair and its pivoted form are ``Plain``. A ``Structured`` place has a form of its own: it says how many numbers each
rank holds, what each costs, and makes them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compiler.factor import Factors, Metric, best
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.pipeline import Context
from compiler.weights.expr import Expr
from passes.low_rank.places import Form, Place, bias_of
from passes.low_rank.rewrite import Keep, Stored, stored


@dataclass(frozen=True)
class Approximation(ABC):
    """What a rank makes of the matrix [m, n] of a place: a dataclass of tensors."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """The matrix float64 [m, n] that it stands for."""

    @abstractmethod
    def stored(self, keep: Keep, place: Place, bias: Tensor | None) -> Stored:
        """It, and the outputs' ``bias`` (float64 [m]), kept in the dtype of the weights."""

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, of which and of ``empty`` of the same rank it can be made again."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class Plain(Factors, Approximation):
    """A pair of factors, or its pivoted form."""

    def stored(self, keep: Keep, place: Place, bias: Tensor | None) -> Stored:
        return stored(keep, place, self, bias)


class Structured(Place, ABC):
    """A place whose matrix becomes something else than a pair of factors. ``numbers`` counts what that holds."""

    pivots: ClassVar[bool] = False

    @abstractmethod
    def costs(self, weight: Tensor, metric: Metric) -> Tensor:
        """What each rank more saves of the cost of ``weight`` [m, n] by ``metric``: float64 [most]."""

    @abstractmethod
    def approximated(self, weight: Tensor, metric: Metric, rank: int) -> Approximation:
        """The best of ``rank`` for ``weight`` [m, n] by ``metric``."""

    @abstractmethod
    def empty(self, rank: int) -> Approximation:
        """What ``approximated`` makes, without values."""


def meta(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor without values."""
    return torch.empty(shape, dtype=dtype, device="meta")


def approximated(form: Form, place: Place, rank: int, weight: Tensor, metric: Metric) -> Approximation:
    """The best of ``rank`` that the form of ``place`` has for ``weight`` [m, n]."""
    if isinstance(place, Structured):
        return place.approximated(weight, metric, rank)
    made = best(weight, metric, rank, form.pivoted(place, rank), place.params[0].storage)
    return Plain(made.first, made.second, made.order)


def empty(form: Form, place: Place, rank: int) -> Approximation:
    """What ``approximated`` makes, without values."""
    if isinstance(place, Structured):
        return place.empty(rank)
    pivots = rank if form.pivoted(place, rank) else 0
    order = meta(place.height, dtype=torch.int64) if pivots else None
    return Plain(meta(rank, place.columns), meta(place.height - pivots, rank), order)


def planned(ctx: Context, form: Form, place: Place, rank: int) -> Stored:
    """What is kept of ``rank``, and a bias where there will be one, without values."""
    ctx.read(place.params[0])
    biased = form.bias or any(bias_of(param) for param in place.params)
    return empty(form, place, rank).stored(ctx.spill, place, meta(place.height) if biased else None)


@dataclass(frozen=True)
class Line:
    """Operations put one after the other before ``node``, in the module ``scope``."""

    graph: Graph
    node: Node
    scope: str

    def linear(self, x: Value, weight: Param, bias: Param | None = None) -> Value:
        return self._op("linear", x, weight, bias)

    def add(self, x: Value, bias: Param | None) -> Value:
        return x if bias is None else self._op("add", x, bias)

    def shaped(self, x: Value, axes: int, *shape: int) -> Value:
        """``x`` with its last ``axes`` axes replaced by those of ``shape``."""
        return self._op("reshape", x, shape=(*x.shape[: x.type.rank - axes], *shape))

    def swapped(self, x: Value, first: int, second: int) -> Value:
        """``x`` with two axes, counted from the last, in each other's place."""
        perm = list(range(x.type.rank))
        perm[first], perm[second] = perm[second], perm[first]
        return self._op("transpose", x, perm=tuple(perm))

    def end(self, value: Value) -> None:
        """Let ``value`` stand in the place of what the node made."""
        self.graph.replace(self.node.output, value)
        self.graph.erase(self.node)

    def _op(self, name: str, *inputs: Value | None, **attrs: object) -> Value:
        return self.graph.op(name, inputs, attrs, scope=self.scope, before=self.node)


def shift(graph: Graph, scope: str, bias: Expr | None) -> Param | None:
    """What is added to the outputs of the module ``scope``, if anything is."""
    return None if bias is None else graph.add_param(f"{scope}.shift", bias)
