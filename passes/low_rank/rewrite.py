"""Put factors in the place of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.factor import Factors
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import reshape, slice
from passes.low_rank.places import Place

Keep = Callable[[str, Tensor], Expr]


@dataclass(frozen=True)
class Stored:
    """The factors of a place as they are kept. ``bias`` [rows]: of outputs, or of pivots and then of the others."""

    first: Expr
    second: Expr
    order: Expr | None = None
    bias: Expr | None = None

    def write(self, graph: Graph, place: Place) -> None:
        """Let every product with the weights of ``place`` go through these factors.

        ``graph`` may be a copy of the one whose parameters ``place`` names.
        """
        params = [graph.params[param.name] for param in place.params]
        users = [list(param.users) for param in params]
        writer = _Writer(graph, place, self, users)
        values = writer.pair() if self.order is None else writer.pivoted(self.order)
        for nodes, results in zip(users, values, strict=True):
            for node, value in zip(nodes, results, strict=True):
                graph.replace(node.output, value)
                graph.erase(node)
        graph.prune()


def stored(keep: Keep, place: Place, factors: Factors, bias: Tensor | None) -> Stored:
    """``factors``, which have their dtype, and the outputs' ``bias`` (float64 [rows]), kept."""
    if bias is not None and factors.order is not None:
        bias = _placed(factors, factors.order, bias)
    storage = place.params[0].storage
    return Stored(
        keep(f"{place.name}.first", factors.first.to(storage)),
        keep(f"{place.name}.second", factors.second.to(storage)),
        None if factors.order is None else keep(f"{place.name}.order", factors.order),
        None if bias is None else keep(f"{place.name}.bias", bias.to(storage)),
    )


def _placed(factors: Factors, order: Tensor, bias: Tensor) -> Tensor:
    """What is added to the pivots, and to the others, which are made of pivots with their bias."""
    placed = bias[order.argsort()]
    first, second = placed.split([len(factors.first), len(factors.second)])
    return torch.cat([first, second - factors.second.double() @ first])


@dataclass(frozen=True)
class _Writer:
    """``users`` are the products with each weight of the place."""

    graph: Graph
    place: Place
    made: Stored
    users: list[list[Node]]

    def pair(self) -> list[list[Value]]:
        made = self.made
        first = self._weight(self.place, "down", made.first, window=True)
        hidden: dict[tuple[str, Value], Value] = {}
        results: list[list[Value]] = []
        for own, start, stop, nodes in self._members():
            holder = self._holder(own, first)
            for node in nodes:
                if (holder.name, node.input(0)) not in hidden:
                    hidden[holder.name, node.input(0)] = self._first(holder, node, first, None)
            second = self._weight(own, "up", slice(made.second, 0, start, stop))
            bias = None if made.bias is None else self._bias(own, "up", made.bias, start, stop)
            results.append(
                [self._second(own, node, hidden[holder.name, node.input(0)], second, bias) for node in nodes]
            )
        return results

    def _holder(self, own: Place, first: Param) -> Place:
        """Whose module applies ``first`` to what ``own`` reads: in another layer it has a name of that layer."""
        if not self.place.repeats:
            return self.place
        if own.name != self.place.name:
            first.aliases = (*first.aliases, f"{own.name}.down.weight")
        return own

    def pivoted(self, order: Expr) -> list[list[Value]]:
        made, rank, height = self.made, self.made.first.shape[0], self.place.height
        first = self._weight(self.place, "pivots", made.first, window=True)
        second = self._weight(self.place, "others", made.second)
        shifts: tuple[Param | None, Param | None] = (None, None)
        if made.bias is not None:
            shifts = (
                self._bias(self.place, "pivots", made.bias, 0, rank),
                self._bias(self.place, "others", made.bias, rank, height),
            )
        joined: dict[Value, Value] = {}
        for node in self.users[0]:
            pivots = self._first(self.place, node, first, shifts[0])
            others = self._second(self.place, node, pivots, second, shifts[1])
            joined[node.input(0)] = self._op(self.place, node, "concat", [pivots, others], axis=_axis(node))
        return [self._ordered(order, joined, *member) for member in self._members()]

    def _ordered(
        self, order: Expr, joined: dict[Value, Value], own: Place, start: int, stop: int, nodes: list[Node]
    ) -> list[Value]:
        """The outputs of one weight of the place, each taken from where it stands."""
        index = self.graph.add_param(f"{own.name}.order", slice(order, 0, start, stop))
        return [self._op(own, node, "take", [joined[node.input(0)], index], axis=_axis(node)) for node in nodes]

    def _members(self) -> list[tuple[Place, int, int, list[Node]]]:
        """Every weight as a place of its own, its first and last row + 1, and the products with it."""
        stops = [sum(self.place.rows[: index + 1]) for index in range(len(self.users))]
        spans = zip(self.place.apart(), self.place.rows, stops, self.users, strict=True)
        return [(own, stop - rows, stop, nodes) for own, rows, stop, nodes in spans]

    def _first(self, holder: Place, node: Node, weight: Param, bias: Param | None) -> Value:
        return self._op(holder, node, node.op.name, [node.input(0), weight, bias], **node.attrs)

    def _second(self, own: Place, node: Node, x: Value, weight: Param, bias: Param | None) -> Value:
        if node.op.name == "linear":
            return self._op(own, node, "linear", [x, weight, bias])
        ones, zeros = ((number,) * (weight.type.rank - 2) for number in (1, 0))
        return self._op(own, node, "conv", [x, weight, bias], stride=ones, padding=zeros, dilation=ones)

    def _op(self, own: Place, node: Node, name: str, inputs: list[Value | None], **attrs: object) -> Value:
        return self.graph.op(name, inputs, attrs, scope=own.name, before=node)

    def _weight(self, own: Place, name: str, expr: Expr, window: bool = False) -> Param:
        """A matrix of the module of ``own``, or a kernel of its window or of 1 where the place is a convolution."""
        node = self.users[0][0]
        if node.op.name == "conv":
            kernel = node.input(1).shape
            sizes = [int(size) for size in kernel[1:]] if window else [expr.shape[1], *(1 for _ in kernel[2:])]
            expr = reshape(expr, (expr.shape[0], *sizes))
        return self.graph.add_param(f"{own.name}.{name}.weight", expr)

    def _bias(self, own: Place, name: str, expr: Expr, start: int, stop: int) -> Param:
        return self.graph.add_param(f"{own.name}.{name}.bias", slice(expr, 0, start, stop))


def _axis(node: Node) -> int:
    """The axis of outputs."""
    return 1 if node.op.name == "conv" else node.output.type.rank - 1
