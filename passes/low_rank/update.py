"""Factorise in the order of computation, each weight on inputs that have passed the factors before it.

There, x becomes y. The best map of y to the original's outputs W x is W* = W E[x y^T] E[y y^T]^-1 (least squares), and
the best of a rank is the truncation of W* under the second moment of y (reduced-rank regression): the sequential
update of SVD-LLM (arXiv 2403.07378), taken to its optimum for both factors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiler.calibration.fidelity import spread
from compiler.calibration.moments import Moments, key_of
from compiler.calibration.products import entering
from compiler.calibration.sweep import Stage, quick_products, sweep
from compiler.ir.graph import Graph, Node
from compiler.ir.layers import copy_of
from passes.low_rank.choose import Ranked
from passes.low_rank.forms import Approximation, approximated, empty
from passes.low_rank.metrics import Batches, Metrics
from passes.low_rank.places import Form, Place
from passes.low_rank.rewrite import Stored
from passes.low_rank.shared import Shared

Made = tuple[Approximation, Tensor | None]
"""Factors, and the bias of the outputs."""

UPDATE_TOKENS = 16384
RIDGE = 1e-3
"""Of the mean energy of inputs: what a departure of W* from W costs."""


@dataclass
class _Paired:
    """Sums over pairs of vectors: x of the original, y of the graph that is being factorised."""

    count: float
    first_x: Tensor
    first_y: Tensor
    cross: Tensor
    second: Tensor

    @staticmethod
    def of(width: int) -> _Paired:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        return _Paired(0.0, zeros(width), zeros(width), zeros(width, width), zeros(width, width))

    def add(self, x: Tensor, y: Tensor) -> None:
        self.count += len(x)
        self.first_x += x.sum(0, dtype=torch.float64)
        self.first_y += y.sum(0, dtype=torch.float64)
        self.cross += x.T @ y
        self.second += y.T @ y

    def mean_x(self) -> Tensor:
        return self.first_x / self.count

    def inputs(self) -> Moments:
        """The moments of y."""
        return Moments(torch.tensor(self.count), self.first_y / self.count, self.second / self.count)

    def fit(self, centred: bool) -> Tensor:
        """F [width, width] with F y nearest to x, both about their means if ``centred``, and near 1 where unseen."""
        second, cross = self.second / self.count, self.cross / self.count
        if centred:
            mean = self.first_y / self.count
            second, cross = second - torch.outer(mean, mean), cross - torch.outer(self.mean_x(), mean)
        ridge = (RIDGE * float(second.diagonal().mean()) or 1.0) * torch.eye(len(second), dtype=torch.float64)
        return torch.linalg.solve(second + ridge, cross + ridge, left=False)


def factorised_in_order(
    graph: Graph, metrics: Metrics, form: Form, before: Mapping[Ranked, Stored], batches: Batches
) -> dict[Ranked, Stored]:
    """``before`` with other factors, made stage by stage on a copy; not of weights with several uses or inputs."""
    left = [ranked for ranked in before if _in_one_stage(ranked.place)]
    made: dict[Ranked, Stored] = {}
    trial, given = copy_of(graph), spread(batches, UPDATE_TOKENS)
    for ranked, factors in before.items():
        if ranked not in left:
            factors.write(trial, ranked.place)
    known = _Known(metrics, form, _key(graph, metrics, form, before, given))
    for theirs, ours in zip(sweep(graph, given, exact=True), sweep(trial, given, exact=True), strict=True):
        for group in _by_input(theirs, left):
            found = known.load(group)
            if found is None:
                paired = _observed(theirs, ours, group[0], trial)
                found = {ranked: _factorised(metrics, form, ranked, paired) for ranked in group}
                known.save(found)
            for ranked, (approximation, bias) in found.items():
                made[ranked] = approximation.stored(metrics.ctx.spill, ranked.place, bias)
                made[ranked].write(trial, ranked.place)
            ours.refresh()
        if len(made) == len(left):
            break
    return {**before, **made}


def _in_one_stage(place: Place) -> bool:
    return not isinstance(place, Shared) and all(len(param.users) == 1 for param in place.params)


def _by_input(stage: Stage, choice: Sequence[Ranked]) -> list[list[Ranked]]:
    """What is chosen in ``stage``, by the input it reads, in order."""
    position = {node: index for index, node in enumerate(stage.nodes)}
    found: dict[object, list[Ranked]] = {}
    own = [ranked for ranked in choice if _node(ranked) in position]
    for ranked in sorted(own, key=lambda ranked: position[_node(ranked)]):
        node = _node(ranked)
        found.setdefault(node if node.op.name == "conv" else node.input(0), []).append(ranked)
    return list(found.values())


def _node(ranked: Ranked) -> Node:
    """The one product with the first weight of a place."""
    return next(iter(ranked.place.params[0].users))


def _observed(theirs: Stage, ours: Stage, ranked: Ranked, trial: Graph) -> _Paired:
    """What the place of ``ranked`` reads in both graphs."""
    params = ranked.place.params[0], trial.params[ranked.place.params[0].name]
    nodes = [next(iter(param.users)) for param in params]
    paired = _Paired.of(ranked.place.columns)
    for stage, node in zip((theirs, ours), nodes, strict=True):
        stage.reach(node)
    values = (stage.values([node.input(0)]) for stage, node in zip((theirs, ours), nodes, strict=True))
    for known in zip(*values, strict=True):
        (_, x), (_, y) = (next(iter(entering(*one))) for one in zip(nodes, params, known, strict=True))
        with quick_products():
            paired.add(x, y)
    return paired


def _factorised(metrics: Metrics, form: Form, ranked: Ranked, paired: _Paired) -> Made:
    place, rank = ranked.place, ranked.rank
    weight, bias, inputs = metrics.weight(place), metrics.bias(place), paired.inputs()
    wanted = weight @ paired.fit(form.bias)
    found = approximated(form, place, rank, wanted, metrics.given(place, inputs))
    if form.bias:
        bias = weight @ paired.mean_x() - found.matrix() @ inputs.mean + (0 if bias is None else bias)
    return found, bias


def _key(graph: Graph, metrics: Metrics, form: Form, choice: Iterable[Ranked], batches: Batches) -> str:
    """A name that changes with the model, the data, the options and the ranks."""
    ranks = [(ranked.place.name, ranked.rank) for ranked in choice]
    model = key_of(graph, {}, batches, (), 0)
    return hashlib.sha256(f"{model} {metrics.kind} {form} {ranks}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Known:
    """Factors in a run's progress, for one that was interrupted to go on from. ``key`` names the job."""

    metrics: Metrics
    form: Form
    key: str

    def save(self, made: Mapping[Ranked, Made]) -> None:
        for ranked, (approximation, bias) in made.items():
            extra = {} if bias is None else {"bias": bias}
            self.metrics.ctx.progress.save(self._name(ranked), {**approximation.tensors(), **extra})

    def load(self, group: Sequence[Ranked]) -> dict[Ranked, Made] | None:
        """What ``save`` kept of ``group``, which was observed together; None if one of them is missing."""
        found: dict[Ranked, Made] = {}
        for ranked in group:
            bundle = self.metrics.ctx.progress.load(self._name(ranked))
            if bundle is None:
                return None
            bias = bundle.pop("bias", None)
            found[ranked] = replace(empty(self.form, ranked.place, ranked.rank), **bundle), bias
        return found

    def _name(self, ranked: Ranked) -> str:
        return f"updated-{self.key}-{ranked.place.name}"
