"""The pass: measure what errors cost, make blocks, and say which are worth most."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from compiler.calibration.fidelity import spread
from compiler.calibration.moments import Moments, Statistics, key_of, measure
from compiler.errors import PassError
from compiler.ir.facts import expert_sites
from compiler.ir.graph import Graph, Param
from compiler.pipeline import Context
from compiler.weights.expr import Expr
from compiler.weights.ops.codec import is_quantised
from compiler.weights.ops.stack import block_bytes, stack
from passes.any_size.decompose import Aim, decomposed

if TYPE_CHECKING:
    from passes.any_size import AnySize

MOMENT_TOKENS, GRADIENT_TOKENS = 16384, 8192
POINTS = 20  # sizes in the record of what is lost at each


class _Stack(NamedTuple):
    """The blocks of one weight, and what is lost with none, one, … of them."""

    blocks: Sequence[Expr]
    lost: Sequence[float]

    @property
    def size(self) -> int:
        """The bytes of a block."""
        return self.blocks[0].type.nbytes

    def worth(self) -> list[float]:
        """What each block saves for each byte, and no more than the one before it."""
        return list(accumulate(((before - after) / self.size for before, after in pairwise(self.lost)), min))


def reduce(graph: Graph, ctx: Context, options: AnySize, params: Sequence[Param]) -> None:
    """Make ``params`` of ``graph`` stacks of blocks."""
    chosen = _chosen(graph, ctx, options, params)
    if ctx.planned:
        made = {param: _planned(ctx, options, param) for param in chosen}
    else:
        made = _made(graph, ctx, options, chosen)
        ctx.record("sizes", _sizes(list(made.values())))
    for param, found in made.items():
        rows, columns = param.type.static_shape
        numbers = {"bytes_before": float(param.expr.type.with_dtype(param.storage).nbytes)}
        if not ctx.planned:
            numbers["relative_error"] = found.lost[-1] / (found.lost[0] or 1.0)
            ctx.weighed(param.name, [k / options.blocks for k in range(options.blocks + 1)], found.lost, 1.0)
        ctx.rewrote(param.name, f"[{rows}, {columns}] as {options.blocks} blocks of rank {options.rank}", **numbers)
        param.expr = stack(found.blocks, (rows, columns), options.rank, found.worth(), param.storage)


def _chosen(graph: Graph, ctx: Context, options: AnySize, params: Sequence[Param]) -> list[Param]:
    """Those of ``params`` that can be made of blocks; others are reported. Raises PassError when there are none."""
    routers = {site.router.input(1) for site in expert_sites(graph) if site.router is not None}
    reasons = {param: "is a router" if param in routers else _obstacle(param, options) for param in params}
    for param, reason in reasons.items():
        if reason:
            ctx.skipped(param.name, reason)
    found = [param for param, reason in reasons.items() if not reason]
    if not found:
        param, reason = next(iter(reasons.items()))
        cause = f"none of the selected weights can be made of blocks: {param.name} {reason}"
        raise PassError(cause, option="where", remedy="select linear maps, or leave `any-size` out")
    return found


def _obstacle(param: Param, options: AnySize) -> str:
    """Why ``param`` cannot be made of blocks; "" when it can."""
    if is_quantised(param.expr):
        return "is quantised already"
    if param.type.rank != 2 or not param.storage.is_floating_point:
        return f"is no matrix of floats but {param.type}"
    if options.rank > min(param.type.static_shape):
        return f"has no rank of {options.rank}"
    reads = {(node.op.name, index) for node in param.users for index, v in enumerate(node.inputs) if v is param}
    others = sorted(name for name, index in reads if (name, index) not in (("linear", 1), ("embedding", 0)))
    if others:
        return f"is read by `{others[0]}`, and not as the weight of a linear map"
    if ("embedding", 0) in reads and len(reads) > 1 and options.tied == "skip":
        return "shares its tensor with the embedding; `tied: share` takes the one tensor for both"
    if ("linear", 1) not in reads and options.metric != "plain":
        return "is a table of vectors alone, of which no calibration says what errors cost; `metric: plain` takes it"
    return ""


def _planned(ctx: Context, options: AnySize, param: Param) -> _Stack:
    """Blocks of the right size, without values."""
    rows, columns = ctx.read(param).shape
    block = torch.empty(block_bytes(rows, columns, options.rank), dtype=torch.uint8, device="meta")
    return _spilled(ctx, options, param, dict.fromkeys(_names(options), block), [0.0] * (options.blocks + 1))


def _names(options: AnySize) -> list[str]:
    return [f"block{index}" for index in range(options.blocks)]


def _spilled(
    ctx: Context, options: AnySize, param: Param, blocks: Mapping[str, Tensor], lost: Sequence[float]
) -> _Stack:
    return _Stack([ctx.spill(f"{param.name}.{name}", blocks[name]) for name in _names(options)], lost)


def _made(graph: Graph, ctx: Context, options: AnySize, params: Sequence[Param]) -> dict[Param, _Stack]:
    """The blocks of every weight; an interrupted run goes on with the first that it has not finished."""
    batches = ctx.calibration() if options.calibrated else []
    given = spread(batches, MOMENT_TOKENS) if batches else []
    gradients = spread(batches, GRADIENT_TOKENS) if options.metric == "loss" else []
    statistics = measure(graph, params if batches else (), given, ctx.progress, gradients=gradients)
    text = f"{key_of(graph, dict.fromkeys(params), given, gradients, 0)} {options!r}"
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    found: dict[Param, _Stack] = {}
    for param in params:
        name = f"blocks-{key}-{param.name}"
        bundle = ctx.progress.load(name)
        if bundle is None:
            bundle = _decomposed(ctx, options, statistics, param)
            ctx.progress.save(name, bundle)
        found[param] = _spilled(ctx, options, param, bundle, bundle["lost"].tolist())
    return found


def _decomposed(ctx: Context, options: AnySize, statistics: Statistics, param: Param) -> dict[str, Tensor]:
    """Each block by name, and ``lost`` float64 [blocks + 1]. Raises PassError for a weight with no finite numbers."""
    aim = _aim(ctx.read(param).float(), statistics, param)
    if not (aim.matrix.isfinite().all() and aim.costs.isfinite().all()):
        raise PassError(
            f"{param.name}, or the gradient at what it makes, holds NaN or infinite values",
            remedy="check the checkpoint and the calibration data",
        )
    blocks, lost = decomposed(aim, options.rank, options.blocks)
    stored = {name: block.stored() for name, block in zip(_names(options), blocks, strict=True)}
    return {**stored, "lost": torch.tensor(lost, dtype=torch.float64)}


def _aim(matrix: Tensor, statistics: Statistics, param: Param) -> Aim:
    rows, columns = matrix.shape
    if param not in statistics:
        return Aim(matrix, torch.eye(columns, dtype=torch.float64), torch.ones(rows, dtype=torch.float64))
    moments = statistics.of(param)
    return Aim(matrix, moments.second, _costs(moments, rows))


def _costs(moments: Moments, rows: int) -> Tensor:
    """The diagonal of M, or ones: float64 [rows]."""
    if moments.gradient is None:
        return torch.ones(rows, dtype=torch.float64)
    return moments.gradient.diagonal() if moments.gradient.ndim == 2 else moments.gradient


def _sizes(made: Sequence[_Stack]) -> dict[str, list[float]]:
    """What is lost, by prediction, with how many bytes of blocks: from none to all."""
    steps = sorted(
        (-worth, found.size, before - after)
        for found in made
        for worth, (before, after) in zip(found.worth(), pairwise(found.lost), strict=True)
    )
    sizes = list(accumulate((size for _, size, _ in steps), initial=0))
    saved = list(accumulate((gain for *_, gain in steps), initial=0.0))
    whole = sum(found.lost[0] for found in made)
    places = sorted({round(index * len(steps) / POINTS) for index in range(POINTS + 1)})
    return {"bytes_of_blocks": [sizes[i] for i in places], "predicted_loss": [whole - saved[i] for i in places]}
