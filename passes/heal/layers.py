"""Layer by layer: fit what was rewritten to what the original layer gives in the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.calibration.distil.job import Job
from compiler.calibration.distil.loss import relative_error
from compiler.calibration.distil.weights import Adam, Trained
from compiler.calibration.distil.windows import STEP_TOKENS, Batch, merged, order, tokens
from compiler.calibration.distil.zeros import keep, kept_of
from compiler.calibration.fidelity import spread
from compiler.calibration.sweep import Stage, quick_products, sweep
from compiler.ir.graph import Graph, Param, Value
from compiler.ir.layers import layer_of, segments

Loss = Callable[[int, Mapping[Value, Tensor]], Tensor]


@dataclass(frozen=True)
class Fit:
    """Weights by name, and the loss on held-out windows before and after. ``seen``: tokens trained on."""

    weights: Mapping[str, Tensor]
    before: float
    after: float
    seen: int


def heal_layers(job: Job, budget: int) -> None:
    """Train every layer's own part of the weights on about ``budget`` tokens, in order.

    A layer is fed what the healed ones before it give, and is to give what the original's layer gives in the original.
    """
    left = _own_params(job)
    if _scopes(job.original) != _scopes(job.graph):
        job.ctx.skipped("", "layers are not healed one by one: they are not those of the original")
        return
    train = merged(job.graph, spread(job.windows.train, budget), STEP_TOKENS)
    batches = [*train, *merged(job.graph, job.windows.held, STEP_TOKENS)]
    for theirs, ours in zip(
        sweep(job.original, batches, exact=True), sweep(job.graph, batches, exact=True), strict=True
    ):
        if not left:
            break
        read = dict.fromkeys(value for node in ours.nodes for value in node.inputs)
        params = [value for value in read if isinstance(value, Param) and value in left]
        if params:
            _heal(job, theirs, ours, params, train, budget)
        left.difference_update(params)


def _scopes(graph: Graph) -> list[str]:
    return [layer.scope if layer else "" for layer, _ in segments(graph)]


def _own_params(job: Job) -> set[Param]:
    """The parameters that one layer alone reads."""
    own: set[Param] = set()
    for param in job.params:
        scopes = {layer.scope if (layer := layer_of(node.scope)) else "" for node in param.users}
        if len(scopes) == 1 and "" not in scopes:
            own.add(param)
        else:
            place = "several layers read it" if "" not in scopes else "it lies outside of layers"
            job.ctx.skipped(param.name, f"is not healed layer by layer: {place}")
    return own


def _heal(job: Job, theirs: Stage, ours: Stage, params: list[Param], train: Sequence[Batch], budget: int) -> None:
    wanted, made = theirs.outputs(), ours.outputs()
    if [value.type for value in wanted] != [value.type for value in made]:
        job.ctx.skipped(ours.scope, "is not healed by itself: it gives other values than the original's layer")
        return
    name = f"layer-{ours.scope}-{job.key}"
    kept = job.ctx.progress.load(name)
    if kept is None:
        fit = _fit(job, params, _loss(theirs, ours), train, budget)
        job.ctx.progress.save(name, _bundle(fit))
    else:
        fit = _unbundled(kept)
    _report(job, ours.scope, fit)
    for param in params:
        if param.name in fit.weights:
            param.expr = keep(job.ctx, param, fit.weights[param.name])


def _loss(theirs: Stage, ours: Stage) -> Loss:
    """Of a batch's number and weights: the error of all that the layer gives."""
    made = ours.outputs()
    targets = [list(values.values()) for values in theirs.values(theirs.outputs())]
    compute = ours.function(made)

    def loss(index: int, weights: Mapping[Value, Tensor]) -> Tensor:
        pairs = zip(compute(index, weights), targets[index], strict=True)
        return torch.stack([relative_error(*pair) for pair in pairs if pair[1].is_floating_point()]).sum()

    return loss


def _fit(job: Job, params: Sequence[Param], loss: Loss, train: Sequence[Batch], budget: int) -> Fit:
    trained = [Trained.of(job.ctx.read(p), 0, torch.Generator(), kept_of(job.ctx, p)) for p in params]
    steps = max(1, round(budget / tokens(train[0])))
    adam = Adam(trained, job.rate, steps)
    before = _held_out(job, loss, len(train), params, trained)
    turns = order(len(train), steps, job.seed)
    with quick_products():
        for index in turns:
            values = [weight.value() for weight in trained]
            error = loss(index, dict(zip(params, values, strict=True)))
            adam.step(torch.autograd.grad(error, values))
    after = _held_out(job, loss, len(train), params, trained)
    better = after < before
    weights = {p.name: w.stored(p.storage) for p, w in zip(params, trained, strict=True)} if better else {}
    return Fit(weights, before, after, sum(tokens(train[index]) for index in turns))


def _held_out(job: Job, loss: Loss, first: int, params: Sequence[Param], trained: Sequence[Trained]) -> float:
    """The mean loss over the batches from ``first`` on, with the weights as they would be stored."""
    pairs = zip(params, trained, strict=True)
    weights: dict[Value, Tensor] = {p: w.stored(p.storage).to(p.type.dtype) for p, w in pairs}
    count = len(merged(job.graph, job.windows.held, STEP_TOKENS))
    with torch.no_grad(), quick_products():
        return sum(float(loss(first + index, weights)) for index in range(count)) / count


def _bundle(fit: Fit) -> dict[str, Tensor]:
    numbers = torch.tensor([fit.before, fit.after, fit.seen], dtype=torch.float64)
    return {"numbers": numbers, **{f"weight.{name}": tensor for name, tensor in fit.weights.items()}}


def _unbundled(kept: Mapping[str, Tensor]) -> Fit:
    before, after, seen = kept["numbers"].tolist()
    weights = {name.removeprefix("weight."): tensor for name, tensor in kept.items() if name != "numbers"}
    return Fit(weights, before, after, int(seen))


def _report(job: Job, scope: str, fit: Fit) -> None:
    if not fit.weights:
        job.ctx.skipped(scope, f"keeps its weights: held-out loss {fit.before:.3g}, trained {fit.after:.3g}")
        return
    job.ctx.rewrote(
        scope,
        "fitted to the original layer's outputs",
        tokens=fit.seen,
        loss_before=fit.before,
        loss_after=fit.after,
    )
