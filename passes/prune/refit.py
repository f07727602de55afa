"""Fit what writes to the residual stream to what the original model has there: least squares in order.

A projection W reads z in the pruned model, and its result is added to the stream s. The original has y there, so W is
to map z to y - s: it also makes up for what the layers before have lost. A token counts by 1 / |y|^2, as what follows
is normed. The fit is drawn towards the projection as it is, as strongly as is best on samples that it does not see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.calibration.moments import key_of
from compiler.calibration.sweep import Stage, quick_products, sweep
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.pipeline import Context
from passes.prune.cut import View

SHRINK = (1e-2, 1e-1, 1.0, 10.0)
"""How strongly, in units of the mean energy of what enters."""
UNSEEN_EVERY = 4

Batches = Sequence[Mapping[str, Tensor]]


@dataclass
class _Sums:
    """Weighted sums over tokens: z z^T [in, in], y z^T [out, in] and |y|^2."""

    gram: Tensor
    cross: Tensor
    energy: float = 0.0

    @staticmethod
    def of(rows: int, columns: int) -> _Sums:
        return _Sums(torch.zeros(columns, columns).double(), torch.zeros(rows, columns).double())

    def add(self, entering: Tensor, wanted: Tensor, scale: Tensor) -> None:
        z, y = entering * scale, wanted * scale
        with quick_products():
            self.gram += z.T @ z
            self.cross += y.T @ z
        self.energy += float(y.double().square().sum())

    def error(self, weight: Tensor) -> float:
        return float((weight @ self.gram * weight).sum() - 2 * (weight * self.cross).sum()) + self.energy

    def plus(self, other: _Sums) -> _Sums:
        return _Sums(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy)


def fitted(weight: Tensor, seen: _Sums, unseen: _Sums) -> tuple[Tensor, float, float]:
    """The fit near ``weight`` [out, in], and the relative errors before and after on what it did not see."""
    found: dict[float, float] = {}
    values, vectors = torch.linalg.eigh(seen.gram)
    mean = float(values.mean()) or 1.0
    turned = (seen.cross @ vectors, weight @ vectors)
    for shrink in SHRINK:
        ridge = shrink * mean
        trial = (turned[0] + ridge * turned[1]) / (values.clamp_min(0) + ridge) @ vectors.T
        found[shrink] = unseen.error(trial)
    before = unseen.error(weight)
    best = min(found, key=lambda shrink: found[shrink])
    if not found[best] < before:
        return weight, before / unseen.energy, before / unseen.energy
    both = seen.plus(unseen)
    ridge = best * float(both.gram.diagonal().mean()) * torch.eye(len(both.gram), dtype=torch.float64)
    made = torch.linalg.solve(both.gram + ridge, (both.cross + weight @ ridge).T).T
    return made, before / unseen.energy, found[best] / unseen.energy


def refit(
    graph: Graph,
    original: Graph,
    same: Mapping[Node, Node],
    views: Mapping[Value, View],
    ctx: Context,
    params: set[Param],
    batches: Batches,
) -> None:
    """Fit ``params`` of ``graph``, stage by stage. ``same`` are the nodes of ``original`` that its nodes come from.

    ``views`` say what of the original's value a value of ``graph`` is to be, where it has become narrower.
    """
    key = _key(graph, params, batches)
    theirs = iter(sweep(original, batches, exact=True))
    there = next(theirs)
    left = set(params)
    for ours in sweep(graph, batches, exact=True):
        nodes = [node for node in ours.nodes if node.op.name == "linear" and node.input(1) in left]
        while nodes and same[nodes[0]] not in set(there.nodes):
            there = next(theirs)
        for node in nodes:
            _refit(ctx, node, same[node], views, ours, there, f"refitted-{key}-{node.input(1).name}")
            left.discard(node.input(1))  # pyright: ignore[reportArgumentType]
        if not left:
            return


def _key(graph: Graph, params: set[Param], batches: Batches) -> str:
    """A name that changes with the pruned model, what is to be fitted, and the data."""
    return key_of(graph, dict.fromkeys(params), batches, (), 0)


def _refit(
    ctx: Context, node: Node, before: Node, views: Mapping[Value, View], ours: Stage, theirs: Stage, name: str
) -> None:
    """Fit the weight of ``node``, or take the fit that the progress of an interrupted run has under ``name``."""
    weight = node.input(1)
    if not isinstance(weight, Param) or len(weight.users) > 1:
        ctx.skipped(node.scope, "is not refitted: several layers share it")
        return
    found = ctx.progress.load(name)
    if found is None:
        found = _fit(ctx, node, weight, before, views, ours, theirs)
        ctx.progress.save(name, found)
    if not found:
        ctx.skipped(node.scope, "is not refitted: there are too few samples to check a fit by")
        return
    weight.expr = ctx.spill(weight.name, found["weight"])
    was, now = found["errors"].tolist()
    ctx.rewrote(node.scope, "fitted to what the original has there", error_before=was, error_after=now)


def _fit(
    ctx: Context,
    node: Node,
    weight: Param,
    before: Node,
    views: Mapping[Value, View],
    ours: Stage,
    theirs: Stage,
) -> dict[str, Tensor]:
    """The fitted weight, and the errors before and after; nothing where there are too few samples."""
    ours.reach(node)
    theirs.reach(before)
    stream = _stream(node)
    bias = node.optional_input(2)
    offset = ctx.value(bias.expr).float() if isinstance(bias, Param) else torch.zeros(())
    goal = before.output if stream is None else next(iter(before.output.users)).output
    view = views.get(node.output)
    wanted = [value for value in (node.input(0), stream) if value is not None]
    sums = _Sums.of(*weight.type.static_shape), _Sums.of(*weight.type.static_shape)
    pairs = zip(theirs.values([goal]), ours.values(wanted), strict=True)
    for index, (there, here) in enumerate(pairs):
        target = view(there[goal]) if view else there[goal]
        norm = target.flatten(0, -2).norm(dim=1, keepdim=True)
        scale = torch.where(norm > 0, norm.reciprocal(), 0)
        rest = target - offset - (here[stream] if stream is not None else 0)
        part = sums[1] if index % UNSEEN_EVERY == UNSEEN_EVERY - 1 else sums[0]
        part.add(here[node.input(0)].flatten(0, -2), rest.flatten(0, -2), scale)
    if not sums[0].energy or not sums[1].energy:
        return {}
    made, was, now = fitted(ctx.value(weight.expr).double(), *sums)
    return {"weight": made.to(weight.storage), "errors": torch.tensor([was, now], dtype=torch.float64)}


def _stream(node: Node) -> Value | None:
    """What the result of ``node`` is added to, right away; None when something lies between."""
    step = node.output.single_user()
    if step is None or step.op.name != "add" or len(step.inputs) != 2:
        return None
    others = (value for value in step.inputs if value is not None and value is not node.output)
    return next((value for value in others if not isinstance(value, Param)), None)


def writers(nodes: Iterable[Node]) -> set[Param]:
    """The weights of linear maps whose results go straight into a sum."""
    found = (node.input(1) for node in nodes if node.op.name == "linear" and _stream(node) is not None)
    return {value for value in found if isinstance(value, Param)}
