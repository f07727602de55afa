"""Tables of embeddings, which may be output layers as well: one narrow table, and a matrix for each use of it.

A table E [v, d] that is looked up becomes A = E V^T [v, r], and what was looked up U A_i; the output layer E h becomes
A (U'^T h). Both are projections of the d numbers of a token, U V behind the table and V^T U'^T before the output layer,
and the best matrix of rank r in the place of E is E times such a projection whatever weighs its errors. So each use is
an identity matrix that gets factors, with V in common: behind the table with the second moments of what is looked up
and of the gradient there, before the output layer with those of the hidden state and of its gradient, transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.factor import INPUT_RIDGE, Metric, root
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.pipeline import Context
from compiler.weights.ops.basic import cast, eye, slice, transpose
from passes.low_rank.basis import Member
from passes.low_rank.metrics import Metrics
from passes.low_rank.places import Form, Place, module_of
from passes.low_rank.rewrite import Stored
from passes.low_rank.shared import Shared, again, rebound

UNSEEN = 0.1  # of the tokens of a text: taken to be spread evenly over the table, which calibration saw little of
BLOCK = 4096  # rows of a table whose products are summed in float32, before they go into a sum in float64


@dataclass(frozen=True)
class Table(Shared):
    """``params`` are identity matrices [d, d]: behind the look-ups in ``table`` and, where there is one, before the
    output layer that reads it."""

    table: Param

    @property
    def shape(self) -> tuple[int, int]:
        return self.table.expr.shape[0], self.columns

    @property
    def height(self) -> int:
        return self.shape[0] + (len(self.params) - 1) * self.columns

    @property
    def full(self) -> int:
        return self.table.type.numel

    @property
    def name(self) -> str:
        return module_of(self.table.name)

    @property
    def words(self) -> str:
        return "a table and a matrix for each of its uses" if len(self.params) > 1 else "a table and a matrix"

    @property
    def unbiased(self) -> int:
        return 0

    def members(self, metrics: Metrics) -> Iterator[Member]:
        gram, plain = self._gram(metrics), metrics.kind == "plain"
        for param in self.params:
            found = metrics.statistics.of(param)
            if _looked_up(param):
                row = gram if plain else (1 - UNSEEN) * found.second + UNSEEN * gram
                left = metrics.left(found.gradient, self.columns)
            else:
                row = _weighing(gram, found.gradient if metrics.kind == "loss" else None)
                left = metrics.right(found)
            yield Member(torch.eye(self.columns, dtype=torch.float64), Metric((left,), root(row, INPUT_RIDGE)))

    def _gram(self, metrics: Metrics) -> Tensor:
        """The mean of e e^T over the rows e of the table: float64 [d, d]."""
        table = metrics.ctx.read(self.table)
        total = torch.zeros(self.columns, self.columns, dtype=torch.float64)
        for rows in table.float().split(BLOCK):
            total += rows.T @ rows
        return total / len(table)

    def made(self, metrics: Metrics, first: Tensor, second: Sequence[Tensor]) -> Stored:
        table = metrics.ctx.read(self.table)
        narrow = torch.cat([rows.double() @ first.double().T for rows in table.split(BLOCK)])
        return self._kept(metrics.ctx, narrow, torch.cat(list(second)))

    def planned(self, ctx: Context, form: Form, rank: int) -> Stored:
        rows, columns = self.shape
        ctx.read(self.table)
        sizes = (rows, rank), (len(self.params) * columns, rank)
        return self._kept(ctx, *(torch.empty(size, device="meta") for size in sizes))

    def _kept(self, ctx: Context, narrow: Tensor, uses: Tensor) -> Stored:
        parts = {"table": narrow, "uses": uses}
        kept = [ctx.spill(f"{self.name}.{name}", part.to(self.table.storage)) for name, part in parts.items()]
        return NarrowTable(*kept)


def _looked_up(param: Param) -> bool:
    """Whether an identity matrix stands behind a look-up, not before an output layer."""
    node = next(iter(param.users)).input(0).node
    return node is not None and node.op.name == "embedding"


def _weighing(gram: Tensor, gradient: Tensor | None) -> Tensor:
    """E^T M E with M of the logits; where only its diagonal is known, or nothing, as if M were of one number."""
    if gradient is None:
        return gram
    return gradient if gradient.ndim == 2 else gram * (gradient.sum() / gram.trace())


class NarrowTable(Stored):
    """``first`` is the table A [v, r], ``second`` the matrices U [d, r] of its uses, stacked."""

    def write(self, graph: Graph, place: Place) -> None:
        assert isinstance(place, Table)
        table, width = graph.params[place.table.name], place.columns
        narrow = rebound(graph, table, self.first)
        for index, param in enumerate(place.params):
            own = graph.params[param.name]
            use, back = slice(self.second, 0, index * width, (index + 1) * width), _looked_up(own)
            matrix = rebound(graph, own, use if back else transpose(use))
            for node in list(own.users):
                (_behind if back else _before)(graph, node, narrow, matrix)
        graph.prune()


def _behind(graph: Graph, node: Node, narrow: Param, matrix: Param) -> None:
    """``node`` multiplies what was looked up by ``matrix`` [d, r]."""
    look = node.input(0).node
    assert look is not None
    looked = graph.op("embedding", [narrow, look.input(1)], scope=look.scope, before=look)
    again(graph, node, [looked, matrix])


def _before(graph: Graph, node: Node, narrow: Param, matrix: Param) -> None:
    """``node`` makes r numbers of the hidden state by ``matrix`` [r, d], and its readers logits of these."""
    users = list(node.output.users)
    made = graph.op("linear", [node.input(0), matrix], scope=node.scope, before=node)
    for user in users:
        again(graph, user, [made, narrow, *user.inputs[2:]])
    graph.erase(node)


def is_table(param: Param) -> bool:
    """Whether ``param`` is looked up, and read by nothing else but output layers."""
    kinds = {node.op.name for node in param.users}
    tabular = all(node.inputs.index(param) == (node.op.name == "linear") for node in param.users)
    return "embedding" in kinds and kinds <= {"embedding", "linear"} and param.type.rank == 2 and tabular


def exposed(graph: Graph, table: Param) -> Table:
    """The place of ``table``, with an identity matrix put behind every look-up and before every output layer."""
    looks = [node for node in table.users if node.op.name == "embedding"]
    heads = [node for node in table.users if node.op.name == "linear"]
    params = [_identity(graph, table, looks, "up")] + ([_identity(graph, table, heads, "down")] if heads else [])
    for look in looks:
        made = graph.op("linear", [look.output, params[0]], scope=f"{look.scope}_up", before=look.following)
        for user in list(look.output.users):
            if user is not made.node:
                _reread(graph, user, look.output, made)
    for head in heads:
        x = head.input(0)
        graph.set_input(head, 0, graph.op("linear", [x, params[1]], scope=f"{head.scope}_down", before=head))
    return Table(tuple(params), table)


def hidden(graph: Graph, place: Table) -> None:
    """Take the identity matrices out again."""
    for param in place.params:
        for node in list(param.users):
            graph.replace(node.output, node.input(0))
            graph.erase(node)
    graph.prune()


def _identity(graph: Graph, table: Param, nodes: Sequence[Node], word: str) -> Param:
    name, *aliases = dict.fromkeys(f"{node.scope}_{word}.weight" for node in nodes)
    matrix = cast(eye(int(table.type.static_shape[1])), table.storage)
    return graph.add_param(name, matrix, table.storage, aliases=tuple(aliases))


def _reread(graph: Graph, node: Node, old: Value, new: Value) -> None:
    for index, value in enumerate(node.inputs):
        if value is old:
            graph.set_input(node, index, new)
