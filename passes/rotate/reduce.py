"""The pass: rotate heads, streams and what MLPs read, and say what stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.errors import PassError
from compiler.ir.coupling import CouplingGroup, coupling_groups
from compiler.ir.facts import attention_sites, expert_sites, latent_sites, mlp_sites
from compiler.ir.graph import Graph, Node, Param
from compiler.ir.layers import copy_of
from compiler.ir.ops.hadamard import basis
from compiler.pipeline import Context
from compiler.rewrite.equivariance import Blocked, region
from compiler.rewrite.rotation import turn, turned, unscale
from compiler.rewrite.scaling import turn_heads
from compiler.rewrite.stream import residual
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import cast, matmul

if TYPE_CHECKING:
    from passes.rotate import Rotate


def rotate(graph: Graph, ctx: Context, wanted: Rotate) -> None:
    """Rotate what ``wanted`` says."""
    done = 0
    if "values" in wanted.kinds:
        done += sum(_rotated_values(graph, ctx, node) for node in _outputs(graph))
    if "mlp" in wanted.kinds:
        done += _rotated_mlps(graph, ctx)
    if "stream" in wanted.kinds:
        done += _rotated_streams(graph, ctx, wanted)
    if not done:
        raise PassError(
            f"nothing of this model can be rotated: {ctx.first_skipped or 'it has none of the kinds in `what`'}",
            option="what",
            remedy="name other kinds, or leave `rotate` out",
        )


def _matrix(ctx: Context, size: int, own: Tensor | None = None) -> Expr:
    """A matrix [size, size]: the basis, or a stream's ``own``."""
    if ctx.planned:
        return ctx.spill(f"hadamard.{size}", torch.empty(size, size, dtype=torch.float64, device="meta"))
    return ctx.spill(f"hadamard.{size}", basis(size)) if own is None else ctx.spill(f"hadamard.stream.{size}", own)


# --- values --------------------------------------------------------------------------------------------------


def _outputs(graph: Graph) -> list[Node]:
    """The output projections of attention, once each."""
    sites = [*attention_sites(graph), *latent_sites(graph)]
    return list(dict.fromkeys(site.output for site in sites if site.output is not None))


def _rotated_values(graph: Graph, ctx: Context, output: Node) -> bool:
    """Rotate the heads of what ``output`` reads. Whether that was possible."""
    weight = output.input(1)
    try:
        found = region(graph, output.input(0), rotations=True)
        turn_heads(found, _matrix(ctx, found.heads.shape[1]))
    except Blocked as blocked:
        ctx.skipped(weight.name, f"its values stay as they are: {blocked.cause}")
        return False
    made_by = ", ".join(param.name for param in found.factors if param is not weight)
    heads, width = found.heads.shape
    ctx.rewrote(weight.name, f"{heads} heads of {width} values rotated, in {made_by} too")
    return True


# --- what MLPs read ------------------------------------------------------------------------------------------


def _rotated_mlps(graph: Graph, ctx: Context) -> int:
    """Rotate what the last projections of MLPs read, as the model runs. Returns how many."""
    done = 0
    for site in mlp_sites(graph):
        weight = site.down.input(1)
        if not isinstance(weight, Param) or len(weight.users) > 1:
            ctx.skipped(weight.name, "is shared, or computed")
            continue
        rotated = graph.op("hadamard", [site.down.input(0)], scope=site.scope, before=site.down)
        graph.set_input(site.down, 0, rotated)
        weight.expr = matmul(cast(weight.expr, torch.float64), _matrix(ctx, weight.expr.shape[1]))
        ctx.rewrote(weight.name, f"reads {weight.expr.shape[1]} channels rotated as the model runs")
        done += 1
    for site in expert_sites(graph):
        ctx.skipped(site.down.name, "experts rotate nothing inside of them")
    if done:
        ctx.warn("a rotation runs with the model: its own class has no place for it, a generated module has")
    return done


# --- streams -------------------------------------------------------------------------------------------------


def _streams(graph: Graph) -> list[CouplingGroup]:
    return [group for group in coupling_groups(graph) if residual(group)]


def _rotated_streams(graph: Graph, ctx: Context, wanted: Rotate) -> int:
    """Rotate every residual stream that can be. Returns how many."""
    generator = torch.Generator().manual_seed(wanted.seed)
    done, norms = 0, len(graph.nodes_named("layer_norm"))
    for number, group in enumerate(_streams(graph)):
        what = f"the residual stream of {group.size}, at {group.members[0].param.name}"
        reason = group.frozen or _obstacle(graph, number)
        signs = torch.randint(0, 2, (group.size,), generator=generator).double() * 2 - 1
        if reason:
            ctx.skipped(what, f"stays as it is: {reason}")
            continue
        original = copy_of(graph)
        for name, head in unscale(graph, group).items():
            ctx.rewrote(head.name, f"has a matrix of its own, not {name}: its norm's scale is in it")
        own = signs[:, None] * basis(group.size)
        if wanted.learn:
            own = _learned(graph, original, ctx, number, own, wanted)
        turn(graph, _streams(graph)[number], _matrix(ctx, group.size, own))
        ctx.rewrote(what, "rotated; scales of norms are in what reads them")
        done += 1
    if len(graph.nodes_named("layer_norm")) < norms:
        ctx.warn("layer norms are root mean squares now: the model's own class has no place for them")
    return done


def _learned(graph: Graph, original: Graph, ctx: Context, number: int, start: Tensor, wanted: Rotate) -> Tensor:
    """A stream's matrix; planned runs only check options and ask for what learning needs."""
    from passes.rotate.learned import codecs_of, learned_basis

    codecs_of([param for param, _ in turned(graph, _streams(graph)[number])], wanted)
    batches = ctx.calibration()
    if ctx.planned:
        return start
    return learned_basis(graph, original, ctx, lambda of: _streams(of)[number], batches, start, wanted)


def _obstacle(graph: Graph, number: int) -> str:
    """Why a stream cannot be rotated, tried on a copy; "" when it can."""
    trial = copy_of(graph)
    try:
        unscale(trial, _streams(trial)[number])
    except PassError as error:
        return error.cause.removeprefix("the residual stream cannot be turned: ")
    return ""
