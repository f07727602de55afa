"""Put factors in the place of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.weights.expr import Expr
from passes.low_rank.factor import Factors
from passes.low_rank.places import Place

Keep = Callable[[str, Tensor], Expr]


@dataclass(frozen=True)
class Writer:
    """Writes factors into ``graph``, which may be a copy of the one whose parameters places name."""

    graph: Graph
    keep: Keep

    def write(self, place: Place, factors: Factors, bias: Tensor | None) -> None:
        """Let every product with the weights of ``place`` go through ``factors``. ``bias`` [rows] is added."""
        write = self._pair if factors.order is None else self._pivoted
        params = [self.graph.params[param.name] for param in place.params]
        users = [list(param.users) for param in params]
        made = write(place, factors, bias, users)
        for nodes, values in zip(users, made, strict=True):
            for node, value in zip(nodes, values, strict=True):
                self.graph.replace(node.output, value)
                self.graph.erase(node)
        self.graph.prune()

    def _pair(self, place: Place, factors: Factors, bias: Tensor | None, users: list[list[Node]]) -> list[list[Value]]:
        first = self._param(place, "down.weight", factors.first, users[0][0])
        hidden = {node.input(0): self._first(place, node, first, None) for node in users[0]}
        made: list[list[Value]] = []
        start = 0
        for param, rows, nodes in zip(place.params, place.rows, users, strict=True):
            own, span = Place((param,)), slice(start, start + rows)
            second = self._param(own, "up.weight", factors.second[span], nodes[0], pointwise=True)
            shift = None if bias is None else self._param(own, "up.bias", bias[span], nodes[0])
            made.append([self._second(own, node, hidden[node.input(0)], second, shift) for node in nodes])
            start += rows
        return made

    def _pivoted(
        self, place: Place, factors: Factors, bias: Tensor | None, users: list[list[Node]]
    ) -> list[list[Value]]:
        assert factors.order is not None
        biases = (None, None) if bias is None else _biases(factors, bias)
        node = users[0][0]
        first = self._linear(place, "pivots", factors.first, biases[0], node)
        second = self._linear(place, "others", factors.second, biases[1], node, pointwise=True)
        joined: dict[Value, Value] = {}
        for node in users[0]:
            pivots = self._first(place, node, *first)
            others = self._second(place, node, pivots, *second)
            joined[node.input(0)] = self._op(place, node, "concat", [pivots, others], axis=_axis(node))
        made: list[list[Value]] = []
        for param, order, nodes in zip(place.params, factors.order.split(list(place.rows)), users, strict=True):
            own = Place((param,))
            index = self._param(own, "order", order, nodes[0])
            made.append(
                [self._op(own, node, "take", [joined[node.input(0)], index], axis=_axis(node)) for node in nodes]
            )
        return made

    def _linear(
        self, place: Place, name: str, weight: Tensor, bias: Tensor | None, node: Node, pointwise: bool = False
    ) -> tuple[Param, Param | None]:
        made = self._param(place, f"{name}.weight", weight, node, pointwise=pointwise)
        return made, None if bias is None else self._param(place, f"{name}.bias", bias, node)

    def _first(self, place: Place, node: Node, weight: Param, bias: Param | None) -> Value:
        return self._op(place, node, node.op.name, [node.input(0), weight, bias], **node.attrs)

    def _second(self, place: Place, node: Node, x: Value, weight: Param, bias: Param | None) -> Value:
        if node.op.name == "linear":
            return self._op(place, node, "linear", [x, weight, bias])
        ones, zeros = ((number,) * (weight.type.rank - 2) for number in (1, 0))
        return self._op(place, node, "conv", [x, weight, bias], stride=ones, padding=zeros, dilation=ones)

    def _op(self, place: Place, node: Node, name: str, inputs: list[Value | None], **attrs: object) -> Value:
        return self.graph.op(name, inputs, attrs, scope=place.name, before=node)

    def _param(self, place: Place, name: str, tensor: Tensor, node: Node, pointwise: bool = False) -> Param:
        """A parameter of the module of ``place``, with the shape of a kernel where ``node`` is a convolution."""
        storage = place.params[0].storage
        if node.op.name == "conv" and tensor.ndim == 2:
            window = (1,) * (node.input(1).type.rank - 2) if pointwise else node.input(1).shape[2:]
            tensor = tensor.reshape(len(tensor), -1, *(int(size) for size in window))
        name = f"{place.name}.{name}"
        if not tensor.is_floating_point():
            return self.graph.add_param(name, self.keep(name, tensor))
        return self.graph.add_param(name, self.keep(name, tensor.to(storage)), storage)


def _axis(node: Node) -> int:
    """The axis of outputs."""
    return 1 if node.op.name == "conv" else node.output.type.rank - 1


def _biases(factors: Factors, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to the pivots, and to the others, which are made of pivots with their bias."""
    assert factors.order is not None
    placed = bias[factors.order.argsort()]
    first, second = placed[: len(factors.first)], placed[len(factors.first) :]
    return first, second - factors.second.double() @ first
