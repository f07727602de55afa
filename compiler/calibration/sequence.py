"""Weights in the order of computation, each with what enters its product after those before it were rewritten.

A pass that rewrites weights one by one on a copy of the graph sees, at each, what it will really meet; and, where the
original is run beside it, what it met there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compiler.calibration.energies import Energies
from compiler.calibration.moments import Moments, at_stage, measure
from compiler.calibration.products import entering, products
from compiler.calibration.sweep import Stage, quick_products, sweep
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.weights.spill import Progress

RIDGE = 1e-2
"""Of the mean energy of inputs: what a departure of the fit from one costs."""
HELD_OUT = 8
"""One in so many batches tells how much of what was found on the others holds."""

Batches = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True)
class Met:
    """Weights of the original that meet the same vectors, the moments of what enters in the rewritten graph, and F.

    F float64 [in, in] takes what enters there towards what enters in the original, as far as batches that it is not
    fitted on agree; None where that was not asked for, or is not known: of experts, which meet other tokens, and of
    weights with several products.
    ``parts`` are the moments of all batches but every eighth, and of these; None where that was not asked for, where
    there is but one batch, or where a weight has several products.
    """

    params: tuple[Param, ...]
    moments: Moments
    fit: Tensor | None = None
    parts: tuple[Moments, Moments] | None = None


def in_order(
    graph: Graph,
    trial: Graph,
    params: Sequence[Param],
    batches: Batches,
    *,
    paired: bool = False,
    energies: Energies | None = None,
    held: bool = False,
) -> Iterator[Met]:
    """Every weight of ``params`` of ``graph``, to be rewritten in ``trial``, its copy, before the next is asked for.

    ``params`` are among ``products(graph)``. Those with several products come first, as the original meets them.
    ``paired`` asks for F, ``held`` for the moments in two parts. By ``energies`` vectors count, or all alike.
    """
    known = products(graph)
    several = [param for param in params if len(known[param]) > 1]
    statistics = measure(graph, several, batches, Progress())
    yield from (Met((param,), statistics.of(param)) for param in several)
    pending = _Pending(graph, trial, {param: known[param][0] for param in params if len(known[param]) == 1})
    original = sweep(graph, batches) if paired else None
    for ours in sweep(trial, batches) if pending.left else ():
        theirs = None if original is None else next(original)
        for group in pending.take(ours):
            pending.reach(ours, theirs, group[0])
            counts = None if energies is None else energies.counts(group)
            twin = pending.twin_of(group[0])
            parts = _parts(trial, ours, twin, counts, len(batches)) if held else None
            moments = at_stage(trial, ours, [twin], counts)[twin] if parts is None else parts[0].joined(parts[1])
            met = Met(tuple(group), moments, parts=parts)
            yield met if theirs is None else replace(met, fit=_fit(theirs, ours, pending, met, counts))
        if not pending.left:
            return


def _parts(
    trial: Graph, stage: Stage, twin: Param, counts: Sequence[Tensor] | None, batches: int
) -> tuple[Moments, Moments] | None:
    """The moments of all batches but every eighth, and of these; None where there is but one."""
    if batches < 2:
        return None
    held = range(0, batches, HELD_OUT)
    rest = set(range(batches)).difference(held)
    return at_stage(trial, stage, [twin], counts, rest)[twin], at_stage(trial, stage, [twin], counts, held)[twin]


class _Pending:
    """Weights that are still to come, and where their products are in both graphs."""

    def __init__(self, graph: Graph, trial: Graph, left: Mapping[Param, Node]) -> None:
        self.left = dict(left)
        self._nodes = dict(left)
        self._twins = dict(zip(graph.nodes, trial.nodes, strict=True))
        self._trial = trial

    def twin_of(self, param: Param) -> Param:
        return self._trial.params[param.name]

    def nodes_of(self, param: Param) -> tuple[Node, Node]:
        """Its product in the original and in the copy."""
        return self._nodes[param], self._twins[self._nodes[param]]

    def reach(self, ours: Stage, theirs: Stage | None, param: Param) -> None:
        """Run both stages up to the product with ``param``, for good."""
        for stage, node in zip((theirs, ours), self.nodes_of(param), strict=True):
            if stage is not None:
                stage.reach(node)

    def take(self, stage: Stage) -> list[list[Param]]:
        """The weights whose products are in ``stage`` of the copy, those together that meet the same vectors."""
        position = {node: index for index, node in enumerate(stage.nodes)}
        own = [param for param, node in self.left.items() if self._twins[node] in position]
        found: dict[tuple[object, ...], list[Param]] = {}
        for param in sorted(own, key=lambda param: position[self._twins[self.left[param]]]):
            node = self.left.pop(param)
            found.setdefault((node.input(0),) if node.op.name == "linear" else (node, param), []).append(param)
        return list(found.values())


def _fit(theirs: Stage, ours: Stage, pending: _Pending, met: Met, counts: Sequence[Tensor] | None) -> Tensor | None:
    """F where ``met`` was met, which both stages have reached."""
    nodes, params = pending.nodes_of(met.params[0]), (met.params[0], pending.twin_of(met.params[0]))
    if nodes[0].op.name == "experts":
        return None
    second, count = met.moments.second, met.moments.count
    cross, held_cross, held_second = (torch.zeros_like(second) for _ in range(3))
    read = (stage.values([node.input(0)]) for stage, node in zip((theirs, ours), nodes, strict=True))
    for batch, known in enumerate(zip(*read, strict=True)):
        x, y = (_vectors(*one) for one in zip(nodes, params, known, strict=True))
        weighed = y if counts is None else y * counts[batch][:, None]
        with quick_products():
            found = (x - y).T @ weighed
            cross += found
            if batch % HELD_OUT == 0:
                held_cross += found
                held_second += y.T @ weighed
    others = _departure(second - held_second / count, (cross - held_cross) / count)
    share = _holds(others, held_second, held_cross)
    return torch.eye(len(second), dtype=torch.float64) + share * _departure(second, cross / count)


def _departure(second: Tensor, cross: Tensor) -> Tensor:
    """F less one, by least squares with a ridge: from E[y y^T] and E[(x - y) y^T]."""
    ridge = (RIDGE * float(second.diagonal().mean()) or 1.0) * torch.eye(len(second), dtype=torch.float64)
    return torch.linalg.solve(second + ridge, cross, left=False)


def _holds(departure: Tensor, second: Tensor, cross: Tensor) -> float:
    """How much of ``departure``, between nothing and all, takes y nearest to x by sums over other vectors."""
    whole = float((departure @ second * departure).sum())
    return min(max(float((departure * cross).sum()) / whole, 0.0), 1.0) if whole > 0 else 0.0


def _vectors(node: Node, param: Param, known: Mapping[Value, Tensor]) -> Tensor:
    ((_, rows),) = entering(node, param, known)
    return rows
