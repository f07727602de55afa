"""Tucker factors of the heads of attention (TensorLLM, arXiv 2501.15674): two matrices that all heads share.

A projection that makes heads is a stack of matrices W_h [w, d], one of width w for each head. W_h becomes U G_h V with
U [w, s] and V [r, d] in common and a core G_h [s, r] of its own: r d + s w + H r s numbers for H heads, of as many
projections as read one input. Of a projection that reads heads, W_h^T becomes that: there what weighs inputs and what
weighs outputs change places. V is the basis of all W_h, U that of all W_h^T, and given both the best core is the
projection of W_h on them, whatever weighs its errors; errors of different heads are taken to be independent. Heads
are narrow as they are, so s shrinks little: s = w (r / the largest r)^(1/16), rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.factor import ROUNDING, Metric, root
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.sites import attention_sites
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import slice as part_of
from passes.low_rank.basis import Member, leading, reduced
from passes.low_rank.forms import Approximation, Line, Structured, meta, shift
from passes.low_rank.places import Place
from passes.low_rank.rewrite import Keep, Stored

SHRINK = 1 / 16


@dataclass(frozen=True)
class Tucker(Structured):
    """``heads`` of each weight, which makes them of one input or, if it ``writes``, an output of them."""

    heads: tuple[int, ...]
    writes: bool

    @property
    def width(self) -> int:
        """Of a head."""
        return (self.columns if self.writes else self.rows[0]) // self.heads[0]

    @property
    def outer(self) -> int:
        return self.height if self.writes else self.columns

    @property
    def most(self) -> int:
        return min(self.width * sum(self.heads), self.outer)

    @property
    def words(self) -> str:
        return f"Tucker factors of {sum(self.heads)} heads"

    def narrow(self, rank: int) -> int:
        """s of ``rank`` r."""
        return math.ceil(self.width * (rank / self.most) ** SHRINK)

    def numbers(self, rank: int) -> int:
        narrow = self.narrow(rank)
        return rank * self.outer + narrow * self.width + sum(self.heads) * narrow * rank

    def costs(self, weight: Tensor, metric: Metric) -> Tensor:
        members = self._members(weight, metric)
        wide, narrow = self._bases(members)
        saved = sum(core.square() for core in _projected(members, wide, narrow)[0])
        kept = 0.5 * torch.as_tensor(saved).cumsum(0).cumsum(1)  # [w, most]
        whole = 0.5 * sum(float(one.metric.errors(one.weight).square().sum()) for one in members)
        reached = [0.0, *(float(kept[self.narrow(rank) - 1, rank - 1]) for rank in range(1, self.most))]
        return torch.tensor([*reached, whole], dtype=torch.float64).diff()

    def approximated(self, weight: Tensor, metric: Metric, rank: int) -> Approximation:
        members, dtype = self._members(weight, metric), self.params[0].storage
        wide, narrow = (found.to(dtype) for found in self._bases(members))
        wide, narrow = wide[:rank], narrow[: self.narrow(rank)]
        cores, triangles = _projected(members, wide.double(), narrow.double())
        return Heads(wide, narrow, torch.stack(_solved(cores, triangles)).to(dtype), self.writes)

    def empty(self, rank: int) -> Approximation:
        narrow = self.narrow(rank)
        return Heads(meta(rank, self.outer), meta(narrow, self.width), meta(sum(self.heads), narrow, rank), self.writes)

    def _members(self, weight: Tensor, metric: Metric) -> list[Member]:
        """The matrix [w, outer] of each head, and what its errors cost."""
        if self.writes:
            (left,), right = metric.left, metric.right
            parts = zip(weight.T.split(self.width), right.split(self.width), strict=True)
            return [Member(own, Metric((_root(rows),), left)) for own, rows in parts]
        lefts = [rows for left in metric.left for rows in left.split(self.width)]
        parts = zip(weight.split(self.width), lefts, strict=True)
        return [Member(own, Metric((_root(rows),), metric.right)) for own, rows in parts]

    def _bases(self, members: Sequence[Member]) -> tuple[Tensor, Tensor]:
        """V [most, outer] and U^T [w, w]: their first rows are those of every rank."""
        return leading(lambda: members), leading(lambda: map(_turned, members))


def _root(rows: Tensor) -> Tensor:
    """The root of a part of a moment, of the ``rows`` of the moment's root."""
    return rows if rows.ndim == 1 else root(rows @ rows.T, ROUNDING)


def _turned(member: Member) -> Member:
    (left,) = member.metric.left
    return Member(member.weight.T, Metric((member.metric.right,), left))


Triangles = tuple[Tensor, Tensor]


def _projected(members: Sequence[Member], wide: Tensor, narrow: Tensor) -> tuple[list[Tensor], list[Triangles]]:
    """Of each matrix what of it lies along both bases, orthonormal where errors count alike [s, r]; and the triangles
    that these bases are in what they were made from."""
    cores: list[Tensor] = []
    triangles: list[Triangles] = []
    for member in members:
        across, first = reduced(member.metric, wide)
        along, second = reduced(_turned(member).metric, narrow)
        cores.append(along.T @ member.metric.errors(member.weight) @ across)
        triangles.append((second, first))
    return cores, triangles


def _solved(cores: Sequence[Tensor], triangles: Sequence[Triangles]) -> list[Tensor]:
    """The best core G beside V and U of each matrix."""
    made: list[Tensor] = []
    for core, (second, first) in zip(cores, triangles, strict=True):
        half = torch.linalg.solve_triangular(second, core, upper=True)
        made.append(torch.linalg.solve_triangular(first.T, half, upper=False, left=False))
    return made


@dataclass(frozen=True)
class Heads(Approximation):
    """``wide`` V [r, outer], ``narrow`` U^T [s, w] and the cores [heads, s, r]."""

    wide: Tensor
    narrow: Tensor
    cores: Tensor
    writes: bool

    def matrix(self) -> Tensor:
        wide, narrow, cores = (part.double() for part in (self.wide, self.narrow, self.cores))
        stacked = (narrow.T @ cores @ wide).flatten(0, 1)
        return stacked.T if self.writes else stacked

    def stored(self, keep: Keep, place: Place, bias: Tensor | None) -> Stored:
        cores = self.cores.flatten(0, 1)
        if self.writes:
            parts = {"down": self.narrow, "core": cores.T, "up": self.wide.T}
        else:
            parts = {"down": self.wide, "core": cores, "up": self.narrow.T}
        if bias is not None:
            parts["bias"] = bias
        storage = place.params[0].storage
        kept = {name: keep(f"{place.name}.{name}", part.to(storage)) for name, part in parts.items()}
        return StoredHeads(kept["down"], kept["up"], None, kept.get("bias"), kept["core"])


@dataclass(frozen=True)
class StoredHeads(Stored):
    """``first`` is what meets the input, ``second`` what makes the output, ``core`` what stands between them."""

    core: Expr | None = None

    def write(self, graph: Graph, place: Place) -> None:
        assert isinstance(place, Tucker) and self.core is not None
        users = [list(graph.params[param.name].users) for param in place.params]
        down = graph.add_param(f"{place.name}.down.weight", self.first)
        name, *aliases = (f"{own.name}.up.weight" for own in place.apart())
        up = graph.add_param(name, self.second, aliases=tuple(aliases))
        if place.writes:
            self._read_heads(graph, place, users[0], down, up)
        else:
            self._make_heads(graph, place, users, down, up)
        graph.prune()

    def _read_heads(self, graph: Graph, place: Tucker, users: Sequence[Node], down: Param, up: Param) -> None:
        assert self.core is not None
        core = graph.add_param(f"{place.name}.core.weight", self.core)
        bias = None if self.bias is None else graph.add_param(f"{place.name}.up.bias", self.bias)
        for node in users:
            line = Line(graph, node, place.name)
            heads = line.shaped(node.input(0), 1, place.heads[0], place.width)
            read = line.shaped(line.linear(heads, down), 2, place.heads[0] * down.type.static_shape[0])
            line.end(line.linear(line.linear(read, core), up, bias))

    def _make_heads(self, graph: Graph, place: Tucker, users: Sequence[Sequence[Node]], down: Param, up: Param) -> None:
        known: dict[Value, Value] = {}
        for own, heads, core, bias, nodes in zip(place.apart(), place.heads, *self._parts(place), users, strict=True):
            matrix = graph.add_param(f"{own.name}.core.weight", core)
            shifted = shift(graph, own.name, bias)
            for node in nodes:
                line = Line(graph, node, own.name)
                x = node.input(0)
                if x not in known:
                    known[x] = Line(graph, node, place.name).linear(x, down)
                made = line.shaped(line.linear(known[x], matrix), 1, heads, up.type.static_shape[1])
                line.end(line.add(line.shaped(line.linear(made, up), 2, heads * place.width), shifted))

    def _parts(self, place: Tucker) -> tuple[list[Expr], list[Expr | None]]:
        """The cores and the bias of each weight."""
        assert self.core is not None
        ends = [sum(place.heads[: index + 1]) for index in range(len(place.heads))]
        spans = list(zip((0, *ends), ends, strict=False))
        narrow = self.core.shape[0] // ends[-1]
        cores = [part_of(self.core, 0, start * narrow, stop * narrow) for start, stop in spans]
        if self.bias is None:
            return cores, [None] * len(cores)
        return cores, [part_of(self.bias, 0, start * place.width, stop * place.width) for start, stop in spans]


def heads_of(graph: Graph) -> dict[Param, Tucker]:
    """The places of all projections of attention that make heads, or read them, and nothing else."""
    found: dict[Param, Tucker] = {}
    for site in attention_sites(graph):
        wide, narrow = site.head_dim, site.value_dim
        made = ((site.query, site.heads, wide), (site.key, site.groups, wide), (site.value, site.groups, narrow))
        for node, heads, width in (*made, (site.output, site.heads, narrow)):
            weight = node.input(1) if node is not None else None
            writes = node is site.output
            if isinstance(weight, Param) and int(weight.shape[int(writes)]) == heads * width:
                found[weight] = Tucker((weight,), (heads,), writes)
    return found
