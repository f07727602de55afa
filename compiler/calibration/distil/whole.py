"""End to end: distil the original's outputs into the whole model, through adapters that are folded afterwards."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from compiler.calibration.distil.job import Job
from compiler.calibration.distil.loss import divergence, relative_error
from compiler.calibration.distil.weights import Adam, Trained
from compiler.calibration.distil.windows import STEP_TOKENS, Batch, merged, order, tokens
from compiler.calibration.distil.zeros import keep, kept_of
from compiler.calibration.fidelity import of_samples
from compiler.calibration.sweep import differentiable, quick_products
from compiler.ir.execute import read_param
from compiler.ir.graph import Graph, Param, Value
from compiler.weights.expr import Expr

SAVE_SECONDS = 60.0
TOGETHER = 512  # tokens that go through the model at a time: logits over a vocabulary are large


def distil(job: Job, rank: int, budget: int) -> tuple[dict[Param, Expr], int]:
    """The weights after training adapters of ``rank`` on about ``budget`` tokens, and the tokens seen.

    The weights of both models are in memory. What an interrupted run has trained is gone on from.
    """
    train = merged(job.graph, job.windows.train, TOGETHER)
    size = max(1, STEP_TOKENS // tokens(train[0]))
    steps = max(1, round(budget / (size * tokens(train[0]))))
    source = torch.Generator().manual_seed(job.seed)
    trained = [Trained.of(job.ctx.read(param), rank, source, kept_of(job.ctx, param)) for param in job.params]
    adam = Adam(trained, job.rate, steps)
    _restore(job, adam)
    turns = order(len(train), steps * size, job.seed)
    pair = Pair(job.original, job.graph, job.params, means=job.means)
    saved = time.perf_counter()
    while not adam.finished:
        turn = turns[adam.done * size : (adam.done + 1) * size]
        adam.step(pair.gradients(trained, [train[index] for index in turn]))
        if adam.finished or time.perf_counter() - saved > SAVE_SECONDS:
            saved = time.perf_counter()
            job.ctx.progress.save(_name(job), adam.state())
    values = zip(job.params, trained, strict=True)
    exprs = {p: keep(job.ctx, p, w.stored(p.storage)) for p, w in values}
    return exprs, sum(tokens(train[index]) for index in turns)


class Valued(Protocol):
    """Something that makes a weight, which gradients can be taken of."""

    def value(self) -> Tensor: ...


class Pair:
    """The original and ``graph``, whose ``params`` are trained: their weights in memory, those that are the same once.

    ``means``: what is compared, where it is no logits, are means over tokens.
    """

    def __init__(self, original: Graph, graph: Graph, params: Sequence[Param], *, means: bool = False) -> None:
        self._original, self._graph, self._params, self._means = original, graph, params, means
        read: dict[str, Tensor] = {}
        self._theirs = _weights(original, read)
        self._ours = _weights(graph, read, without=set(params))

    def gradients(self, trained: Sequence[Valued], batches: Sequence[Batch]) -> list[Tensor]:
        """Of the mean loss over ``batches`` by the trained weights, one for each of ``params``."""
        values = [weight.value() for weight in trained]
        weights = {**self._ours, **dict(zip(self._params, values, strict=True))}
        for batch in batches:
            with quick_products():
                with torch.no_grad():
                    wanted = differentiable(self._original, batch, self._theirs)
                found = differentiable(self._graph, batch, weights)
                _backward(found, wanted, len(batches), self._means)
        return [torch.zeros_like(value) if value.grad is None else value.grad for value in values]


def _weights(graph: Graph, read: dict[str, Tensor], without: set[Param] | None = None) -> dict[Value, Tensor]:
    """Every parameter's value; ``read`` holds those known by their expression."""
    found: dict[Value, Tensor] = {}
    for param in graph.params.values():
        if without is None or param not in without:
            key = f"{param.expr.key} {param.type.dtype}"
            read[key] = read[key] if key in read else read_param(graph, param)
            found[param] = read[key]
    return found


def _backward(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], count: int, means: bool) -> None:
    """Add the gradients of a batch's loss, of which ``count`` are averaged; with ``means``, of means over tokens."""
    for name, output in found.items():
        if not output.requires_grad:
            continue
        if name == "logits":
            _, gradient = divergence(output, wanted[name])
            output.backward(gradient / count, retain_graph=len(found) > 1)
        else:
            pair = [of_samples(each) if means else each for each in (output, wanted[name])]
            (relative_error(*pair) / count).backward(retain_graph=len(found) > 1)


def _restore(job: Job, adam: Adam) -> None:
    """Go on from what was saved, if anything was."""
    state = job.ctx.progress.load(_name(job))
    if state is not None:
        adam.restore(state)


def _name(job: Job) -> str:
    return f"whole-{job.key}"
