"""Block by block: codes and scales learned so that each layer's outputs are those that the original's layer has.

A layer is fed what the quantised ones before it give, and aims at what the original's gives in the original. What is
learned starts from the codes that `method` chose, and is kept only where it is nearer on windows that it did not see:
layer by layer, and then all of it or nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibration.distil.loss import relative_error
from compiler.calibration.distil.windows import divide, merged, order
from compiler.calibration.fidelity import Fidelity, spread
from compiler.calibration.moments import key_of
from compiler.calibration.sweep import Stage, quick_products, sweep
from compiler.ir.graph import Graph, Param, Value
from compiler.ir.layers import copy_of, layer_of
from compiler.pipeline import Context
from compiler.weights.expr import Expr, apply
from passes.quantize.learned import Learned, rounding, scaling

if TYPE_CHECKING:
    from passes.quantize import Quantize

TOKENS = 16384  # of calibration data, held-out windows included
STEP_TOKENS = 512
LOOKS = 8  # at held-out windows, of which the best is kept


@dataclass(frozen=True)
class _Data:
    """Batches, of which the first ``train`` are learned from, and the last are held out; ``key`` names the job."""

    batches: Sequence[Mapping[str, Tensor]]
    train: int
    key: str


@dataclass(frozen=True)
class _Block:
    """The weights of a layer that learned, none where that is no nearer, and held-out losses."""

    scope: str
    exprs: Mapping[Param, Expr]
    before: float
    after: float


def learn_blocks(graph: Graph, ctx: Context, wanted: Quantize, made: Mapping[Param, Expr]) -> dict[Param, Expr]:
    """Those of ``made``, integers in the places of weights of ``graph``, that learning brought nearer.

    Raises PassError when there are fewer than two windows of calibration data.
    """
    plain, trial = _with(graph, made), _with(graph, made)
    data = _data(graph, ctx, wanted, made)
    found: dict[Param, Expr] = {}
    blocks: list[_Block] = []
    left = _own_params(ctx, list(made))
    for theirs, ours in zip(
        sweep(graph, data.batches, exact=True), sweep(trial, data.batches, exact=True), strict=True
    ):
        if not left:
            break
        read = {value for node in theirs.nodes for value in node.inputs}
        params = [param for param in left if param in read]
        if params:
            blocks.append(_of_block(ctx, wanted, trial, params, (theirs, ours), data))
            for param, expr in blocks[-1].exprs.items():
                found[param] = trial.params[param.name].expr = expr
        left = [param for param in left if param not in read]
    fidelity = Fidelity(graph, data.batches[data.train :])
    before, after = fidelity.distance(plain), fidelity.distance(trial)
    ctx.tried("codes as they were chosen", before, after >= before)
    ctx.tried(f"{wanted.learn} learned", after, after < before)
    for block in blocks:
        _report(ctx, wanted, block, kept=after < before)
    return found if after < before else {}


def _with(graph: Graph, made: Mapping[Param, Expr]) -> Graph:
    found = copy_of(graph)
    for param, expr in made.items():
        found.params[param.name].expr = expr
    return found


def _report(ctx: Context, wanted: Quantize, block: _Block, *, kept: bool) -> None:
    if not block.exprs:
        ctx.skipped(block.scope, f"keeps its codes: held-out loss {block.before:.3g} is not undercut by learning")
    elif not kept:
        ctx.skipped(block.scope, "keeps its codes: the whole model is no nearer with what its layers learned")
    else:
        losses = {"loss_before": block.before, "loss_after": block.after}
        ctx.rewrote(block.scope, f"{wanted.learn} learned on the layer's outputs", **losses)


def _data(graph: Graph, ctx: Context, wanted: Quantize, made: Mapping[Param, Expr]) -> _Data:
    windows = divide(spread(ctx.calibration(), TOKENS))
    parts = [merged(graph, part, STEP_TOKENS) for part in (windows.train, windows.held)]
    codes = " ".join(f"{param.name} {expr.key}" for param, expr in made.items())
    key = f"{key_of(graph, made, [*parts[0], *parts[1]], (), 0)} {wanted!r} {codes}"
    return _Data([*parts[0], *parts[1]], len(parts[0]), hashlib.sha256(key.encode()).hexdigest()[:16])


def _own_params(ctx: Context, params: Sequence[Param]) -> list[Param]:
    """Those that one layer alone reads."""
    own: list[Param] = []
    for param in params:
        scopes = {layer.scope if (layer := layer_of(node.scope)) else "" for node in param.users}
        if len(scopes) == 1 and "" not in scopes:
            own.append(param)
        else:
            ctx.skipped(param.name, "keeps its codes: no single layer reads it, whose outputs could be aimed at")
    return own


def _of_block(
    ctx: Context, wanted: Quantize, trial: Graph, params: Sequence[Param], stages: tuple[Stage, Stage], data: _Data
) -> _Block:
    """What was learned of one layer's ``params``."""
    theirs, ours = stages
    name = f"learned-{data.key}-{params[0].name}"
    bundle = ctx.progress.load(name)
    if bundle is None:
        bundle = _fitted(ctx, wanted, trial, params, theirs, ours, data)
        ctx.progress.save(name, bundle)
    before, after = bundle["losses"].tolist()
    chosen = params if after < before else ()
    exprs = {param: _expression(ctx, trial.params[param.name].expr, param.name, bundle) for param in chosen}
    return _Block(ours.scope, exprs, before, after)


def _expression(ctx: Context, before: Expr, name: str, bundle: Mapping[str, Tensor]) -> Expr:
    codes, scale = (ctx.spill(f"{name}.learned-{part}", bundle[f"{part}.{name}"]) for part in ("codes", "scale"))
    return apply("dequantize", [codes, scale, *before.args[2:]], dict(before.attrs))


def _fitted(
    ctx: Context,
    wanted: Quantize,
    trial: Graph,
    params: Sequence[Param],
    theirs: Stage,
    ours: Stage,
    data: _Data,
) -> dict[str, Tensor]:
    """The best codes and scales of ``params`` that were seen, by name, and the held-out losses before and of these."""
    targets = [list(values.values()) for values in theirs.values(theirs.outputs())]
    compute = ours.function(ours.outputs())
    twins = [trial.params[param.name] for param in params]
    weights = [_start(ctx, wanted, param, twin.expr) for param, twin in zip(params, twins, strict=True)]

    def loss(index: int) -> Tensor:
        given: dict[Value, Tensor] = {t: w.value().to(t.type.dtype) for t, w in zip(twins, weights, strict=True)}
        pairs = zip(compute(index, given), targets[index], strict=True)
        return torch.stack([relative_error(*pair) for pair in pairs if pair[1].is_floating_point()]).sum()

    def held_out() -> float:
        with torch.no_grad(), quick_products():
            return sum(float(loss(index)) for index in range(data.train, len(data.batches)))

    before = best = held_out()
    kept = _settled(params, weights)
    leaves = [leaf for weight in weights for leaf in weight.leaves]
    looks = max(1, wanted.steps // LOOKS)
    for step, index in enumerate(order(data.train, wanted.steps, 0), 1):
        with quick_products():
            gradients = iter(torch.autograd.grad(loss(index), leaves))
        for weight in weights:
            weight.step([next(gradients) for _ in weight.leaves], (step - 1) / wanted.steps, wanted.steps)
        if step % looks == 0 or step == wanted.steps:
            after = held_out()
            if after < best:
                best, kept = after, _settled(params, weights)
    return {"losses": torch.tensor([before, best], dtype=torch.float64), **kept}


def _settled(params: Sequence[Param], weights: Sequence[Learned]) -> dict[str, Tensor]:
    """Codes and scales by name."""
    stored = {param.name: weight.settled() for param, weight in zip(params, weights, strict=True)}
    return {f"{part}.{name}": kept[i] for name, kept in stored.items() for i, part in enumerate(("codes", "scale"))}


def _start(ctx: Context, wanted: Quantize, param: Param, expr: Expr) -> Learned:
    codes, scale, *zero = (ctx.value(arg) for arg in expr.args)
    made = rounding if wanted.learn == "rounding" else scaling
    return made(ctx.read(param), codes, scale, zero[0] if zero else None, expr.attr("bits"))
