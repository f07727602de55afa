"""The residual stream: what writes to it, norms and reads it, and how it gets narrower.

Its indices are one coupling group that runs through norms, which divide by the width they are given. Of n indices n'
remain; a norm that is given c x, c^2 = n'/n, in their place yields c times what it yields of x with the others at
zero, epsilon included. So all that writes to the stream is multiplied by c, and the norms' scales are divided by it.
(A layer norm averages over what remains.) Where something that is not linear writes to the stream, c has no place,
and the epsilon of the norm changes instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import networkx
import torch

from compiler.errors import PassError
from compiler.ir.coupling import CouplingGroup
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.rewrite.removal import remove
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import add, cast, full, scale

MOVES = ("cast", "reshape", "transpose", "slice", "concat", "expand", "gather", "take", "embedding")
LINEAR = frozenset((*MOVES, "add", "sub", "mul", "div", "mean", "sum"))
"""Operations along whose operands a factor of the whole vector passes to the result."""
NORMS = ("rms_norm", "layer_norm")
PRODUCTS = ("linear", "conv", "experts")


@dataclass(frozen=True)
class Use:
    """A weight that writes to the stream or reads it, along ``axis``, in ``node``."""

    node: Node
    param: Param
    axis: int


@dataclass
class Stream:
    """``group`` cut into parts: values (tables and added vectors among them) that have one scale between them.

    ``part`` is the number of each value's part. ``norms`` normalise it; ``writers`` and ``readers`` are products and
    their biases; ``roots`` multiply an embedding by the root of the width. Parts in ``closed`` are touched by
    operations that are not linear.
    """

    group: CouplingGroup
    nodes: list[Node]
    part: dict[Value, int]
    norms: list[Node] = field(default_factory=list[Node])
    writers: list[Use] = field(default_factory=list[Use])
    readers: list[Use] = field(default_factory=list[Use])
    roots: list[Node] = field(default_factory=list[Node])
    closed: set[int] = field(default_factory=set[int])

    @staticmethod
    def of(graph: Graph, group: CouplingGroup) -> Stream:
        """Raises PassError when the group is a factor of an axis, as heads are."""
        if any(stride != 1 for _, _, stride in group.values) or any(m.stride != 1 for m in group.members):
            raise PassError("this is no residual stream: its indices are parts of an axis")
        inside = {value for value, _, _ in group.values}
        nodes = [node for node in graph.nodes if not inside.isdisjoint((*node.inputs, *node.outputs))]
        stream = Stream(group, nodes, {})
        stream._cut_into_parts(inside, {member.param for member in group.members})
        for node in nodes:
            stream._sort(node)
        return stream

    def of_value(self, value: Value | None) -> int | None:
        """The part of ``value``; None for what is not in the stream."""
        return None if value is None else self.part.get(value)

    def part_in(self, node: Node) -> int | None:
        return self.of_value(node.input(0))

    def part_out(self, node: Node) -> int | None:
        return self.of_value(node.outputs[0])

    @property
    def normed(self) -> set[int]:
        """The parts that norms read."""
        return {part for node in self.norms if (part := self.part_in(node)) is not None}

    def _cut_into_parts(self, inside: set[Value], members: set[Param]) -> None:
        network: networkx.Graph[Value] = networkx.Graph()
        network.add_nodes_from(inside)
        for node in self.nodes:
            if node.op.name in LINEAR and not _is_root(node, self.group.size):
                joined = [v for v in _passing(node) if v in inside or v in members]
                network.add_edges_from((joined[0], other) for other in joined[1:])
        for number, values in enumerate(networkx.connected_components(network)):
            self.part.update(dict.fromkeys(values, number))

    def _sort(self, node: Node) -> None:
        if node.op.name in NORMS:
            self.norms.append(node)
        elif node.op.name in PRODUCTS:
            self._sort_product(node)
        elif _is_root(node, self.group.size):
            self.roots.append(node)
        elif node.op.name not in LINEAR or _multiplies(node, set(self.part)):
            touched = (self.of_value(value) for value in (*node.inputs, *node.outputs))
            self.closed |= {part for part in touched if part is not None}

    def _sort_product(self, node: Node) -> None:
        own = {(member.param, member.axis) for member in self.group.members}
        writes, reads = _axes(node)
        for uses, axes in ((self.writers, writes), (self.readers, reads)):
            for index, axis in axes:
                param = node.optional_input(index)
                if isinstance(param, Param) and (param, axis) in own:
                    uses.append(Use(node, param, axis))
                elif (self.part_out(node) if uses is self.writers else self.part_in(node)) is not None and param:
                    self.closed |= {p for p in (self.part_in(node), self.part_out(node)) if p is not None}


def _axes(node: Node) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(operand, axis) of a product's weights along what leaves it, and along what enters it."""
    if node.op.name == "experts":
        return [(4, 1), (6, 1)], [(3, 2)]
    return [(1, 0), (2, 0)], [(1, 1)]


def _passing(node: Node) -> Iterator[Value]:
    """The values of ``node`` that have its result's scale: of products only one factor."""
    given = [value for value in node.inputs if value is not None]
    if node.op.name in ("mul", "div"):
        given = [value for value in given if not isinstance(value, Param)] if len(given) > 1 else given
    return iter([*given, *node.outputs])


def _multiplies(node: Node, inside: set[Value]) -> bool:
    """Whether two values of the stream are multiplied with each other."""
    factors = [v for v in node.inputs if v in inside and not isinstance(v, Param)]
    return (node.op.name == "mul" and len(factors) > 1) or (node.op.name == "div" and factors[-1:] == node.inputs[1:])


def _is_root(node: Node, width: int) -> bool:
    """Whether ``node`` multiplies an embedding by the root of its width, as a class does that is told the width."""
    if node.op.name != "mul" or len(node.inputs) > 1:
        return False
    source = node.input(0).node
    return source is not None and source.op.name == "embedding" and _close(node.attr("scalar"), math.sqrt(width))


def _close(found: float, wanted: float) -> bool:
    return math.isclose(found, wanted, rel_tol=torch.finfo(torch.float32).eps)


def residual(group: CouplingGroup) -> bool:
    """Whether the indices are those of a residual stream: of sums that norms average over."""
    sums = (value.node for value, _, _ in group.values if value.node is not None and value.node.op.name == "add")
    return bool(group.normed) and any(_of_two(node) for node in sums)


def _of_two(node: Node) -> bool:
    return len([value for value in node.inputs if value is not None and not isinstance(value, Param)]) == 2


def narrow(graph: Graph, group: CouplingGroup, kept: Sequence[int]) -> dict[Value, float]:
    """Leave of a residual stream the indices ``kept``: what it computes is what it did with the others at zero.

    Returns the factor by which what is left of every value in it is larger than it was.
    Raises PassError when the group is frozen, or when one weight would have to be two.
    """
    stream = Stream.of(graph, group)
    scales = _Scales(stream, len(kept))
    scales.apply(graph)
    remove(graph, {replace(group, normed=""): kept})
    return {value: scales.of(value) for value in stream.part}


class _Scales:
    """By what factor every part of a stream of ``size`` indices is larger than it was among more of them."""

    def __init__(self, stream: Stream, size: int) -> None:
        self._stream = stream
        self._size = size
        self._c = math.sqrt(size / stream.group.size)
        self._found: dict[int, float] = dict.fromkeys(stream.closed, 1.0)
        for part in stream.normed - stream.closed:
            self._set(part, self._c)
        for node in stream.roots:
            self._set(stream.part_in(node), self.of(node.output) * node.attr("scalar") / self._root(node))
        for use in stream.readers:
            if use.param in stream.part and (part := stream.part_in(use.node)) is not None:
                self._set(part, 1 / self.of(use.param))

    def of(self, value: Value | None) -> float:
        part = self._stream.of_value(value)
        return 1.0 if part is None else self._found.get(part, 1.0)

    def _set(self, part: int | None, factor: float) -> None:
        if part is None:
            return
        if not math.isclose(self._found.setdefault(part, factor), factor):
            raise PassError(
                "a weight that is shared would have to be scaled in two ways",
                remedy="leave `hidden` out of `what`",
            )

    def _root(self, node: Node) -> float:
        """The root of the new width, in the precision that the old one has."""
        before, after = node.attr("scalar"), math.sqrt(self._size)
        exact = before == math.sqrt(self._stream.group.size)
        return after if exact else float(torch.tensor(after, dtype=torch.float32))

    def apply(self, graph: Graph) -> None:
        factors = self._of_params()
        for param, factor in factors.items():
            param.expr = multiplied(param.expr, factor)
        for node in self._stream.roots:
            node.attrs = node.op.normalise_attrs({**node.attrs, "scalar": self._root(node)})
        for node in self._stream.norms:
            self._renormed(graph, node)

    def _of_params(self) -> dict[Param, float]:
        """Factors of tables, added vectors, products, their biases, and shifts of norms."""
        found: dict[Param, float] = {}
        wanted = [(p, self.of(p)) for p in self._stream.part if isinstance(p, Param)]
        wanted += [(use.param, self._of_use(use)) for use in (*self._stream.writers, *self._stream.readers)]
        for node in self._stream.norms:
            shift = node.optional_input(2)
            if isinstance(shift, Param):
                wanted.append((shift, self.of(node.output)))
        for param, factor in wanted:
            if not math.isclose(found.setdefault(param, factor), factor):
                raise PassError(f"{param.name} is shared, and would have to be scaled in two ways")
        return found

    def _of_use(self, use: Use) -> float:
        """What a weight that reads x and writes y is multiplied by: y's factor by x's."""
        written = self.of(use.node.output) if use.param is not use.node.optional_input(3) else 1.0
        reads = use.param.type.rank > 1 and not (use.node.op.name == "experts" and written != 1.0)
        return written / self.of(use.node.input(0)) if reads else written

    def _renormed(self, graph: Graph, node: Node) -> None:
        """The scale of a norm over fewer indices, and its epsilon where what enters is not scaled."""
        if math.isclose(self.of(node.input(0)), 1.0):
            node.attrs = node.op.normalise_attrs({**node.attrs, "eps": node.attr("eps") / self._c**2})
        factor, weight = self.of(node.output) / self._c, node.optional_input(1)
        if isinstance(weight, Param):
            offset = node.attr("offset") if "offset" in node.op.attrs else 0.0
            weight.expr = multiplied(weight.expr, factor, offset * (factor - 1))
        elif not math.isclose(factor, 1.0):
            made = graph.op("mul", [node.output], {"scalar": factor}, scope=node.scope, before=node.following)
            _pass_by(graph, node.output, made)


def _pass_by(graph: Graph, old: Value, new: Value) -> None:
    """Let every user of ``old`` but the node that makes ``new`` read ``new``."""
    for user in [user for user in old.users if user is not new.node]:
        for index, value in enumerate(user.inputs):
            if value is old:
                graph.set_input(user, index, new)


def multiplied(expr: Expr, factor: float, more: float = 0.0) -> Expr:
    """``factor`` times ``expr`` plus ``more``, in float64 where that changes anything."""
    if math.isclose(factor, 1.0, rel_tol=1e-15) and not more:
        return expr
    wide = scale(cast(expr, torch.float64), factor)
    return add(wide, full(wide.shape, more, torch.float64)) if more else wide
