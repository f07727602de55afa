"""The truncating conversion: measure every attention, choose widths, rewrite layer by layer, refit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibration.fidelity import positions, spread
from compiler.calibration.sweep import Stage, sweep
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.pipeline import Context, no_calibration
from passes.gqa_to_mla.build import add_zero_bias
from passes.gqa_to_mla.choose import choose
from passes.gqa_to_mla.latent import LatentMaps, Layout, analyse, latent_maps
from passes.gqa_to_mla.measured import Measured, Stored, store
from passes.gqa_to_mla.moments import measure
from passes.gqa_to_mla.refit import refitted
from passes.gqa_to_mla.source import Source
from passes.gqa_to_mla.thin import Unrotated, common_width
from passes.gqa_to_mla.truncate import Truncation, form_of, take_over

if TYPE_CHECKING:
    from passes.gqa_to_mla import GqaToMla

MOMENT_TOKENS = 8192  # attention weights are quadratic in a sample's length: enough for second moments, and affordable
REFIT_TOKENS = 8192
ENOUGH = 4  # tokens for each number of a second moment's width

Batches = Sequence[Mapping[str, Tensor]]


def reduce_cache(graph: Graph, ctx: Context, options: GqaToMla, sources: Sequence[Source]) -> None:
    """Rewrite ``sources`` of ``graph`` with the widths that ``options`` ask for."""
    if not ctx.has_calibration:  # a plan says so too
        no_calibration(graph)
    batches = ctx.calibration()
    seen = spread(batches, max(MOMENT_TOKENS, ENOUGH * max(source.cached for source in sources)))
    measured = {} if ctx.planned else _measure(graph, sources, seen, ctx)
    layouts = choose(graph, ctx, options, sources, measured, batches)
    if not ctx.planned:
        _warn_of_few(ctx, sum(map(positions, seen)), max(layout.rank for layout in layouts))
    conversion = Truncation(graph, form_of(graph, sources, layouts), ctx.spill, ctx.value, {})
    maps = _all_maps(ctx, measured, sources, layouts)
    latent = {
        source: _convert(conversion, ctx, source, layout, own)
        for source, layout, own in zip(sources, layouts, maps, strict=True)
    }
    if options.refit and not ctx.planned:
        _refit(graph, ctx, latent, spread(batches, REFIT_TOKENS))
    for source, node in latent.items():
        if source.site.node in graph:
            take_over(graph, source, node)
        if conversion.form.biased and len(source.output.inputs) == 2:
            add_zero_bias(graph, source.output)


def _warn_of_few(ctx: Context, tokens: int, rank: int) -> None:
    enough = ENOUGH * rank
    if tokens < enough:
        ctx.warn(f"a latent of {rank} follows from {tokens} tokens of calibration data: {enough} would be enough")


def _measure(graph: Graph, sources: Sequence[Source], batches: Batches, ctx: Context) -> dict[Node, Measured]:
    """The moments of every source, on the original's activations."""
    measured: dict[Node, Measured] = {}
    for stage in sweep(graph, batches):
        for source in _in_stage(stage, sources):
            moments = measure(stage, source, ctx.value(source.output_weight.expr))
            loss = analyse(source, moments).components.loss
            measured[source.site.node] = Measured(source, store(ctx, "moments", moments), loss)
        if len(measured) == len(sources):
            break
    return measured


def _in_stage(stage: Stage, sources: Sequence[Source]) -> list[Source]:
    nodes = set(stage.nodes)
    return [source for source in sources if source.site.node in nodes]


def _all_maps(
    ctx: Context, measured: Mapping[Node, Measured], sources: Sequence[Source], layouts: Sequence[Layout]
) -> Iterator[LatentMaps]:
    """The matrices of every attention in turn; how far all of them can be thinned, the sum of their losses says."""
    if ctx.planned:
        yield from (planned_maps(source, layout) for source, layout in zip(sources, layouts, strict=True))
        return
    own = [measured[source.site.node] for source in sources]
    stored: list[Stored[LatentMaps]] = []
    losses: list[Tensor] = []
    error = 0.0
    for one, layout in zip(own, layouts, strict=True):
        analysis = one.analysis()
        maps = latent_maps(analysis, layout)
        losses.append(Unrotated(analysis, maps).losses)
        error += maps.error
        stored.append(store(ctx, "maps", maps))
    width = common_width(losses, error)
    for one, kept in zip(own, stored, strict=True):
        yield Unrotated(one.analysis(), kept.read()).cut(width)


def planned_maps(source: Source, layout: Layout) -> LatentMaps:
    """Matrices of the right shapes, without values."""
    reached = sum(count < source.groups for count in layout.kept)
    unrotated = 2 * reached + source.unrotated

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device="meta")

    return LatentMaps(
        down=empty(layout.rank, source.cached),
        rotary_key=empty(layout.rotary_dim, source.cached),
        query=empty(source.heads, unrotated + layout.rotary_dim, source.head_dim),
        up=empty(source.heads * (unrotated + source.value_dim), layout.rank),
        freed=0.0,
        key_error=0.0,
        value_error=0.0,
    )


def _convert(conversion: Truncation, ctx: Context, source: Source, layout: Layout, maps: LatentMaps) -> Node:
    ctx.rewrote(
        source.site.scope,
        f"a latent of {layout.rank} and a rotary key of {layout.rotary_dim} for {source.groups} groups",
        cache_values_before=source.cached,
        cache_values_after=layout.cached,
        query_rows_before=source.heads * source.head_dim,
        query_rows_after=maps.query.shape[0] * maps.query.shape[1],
        freed_rotation_error=maps.freed,
        key_error=maps.key_error,
        value_error=maps.value_error,
    )
    return conversion.convert(source, layout, maps)


def _refit(graph: Graph, ctx: Context, latent: Mapping[Source, Node], batches: Batches) -> None:
    """Let the latent attentions take over in order; each output projection is fitted to what the original attention
    yields from inputs that have passed the attentions converted before it."""
    left = set(latent)
    for stage in sweep(graph, batches, exact=True):
        for source in _in_stage(stage, list(latent)):
            left.discard(source)
            output, weight = source.output, source.output_weight
            if len(weight.users) > 1:
                take_over(graph, source, latent[source])
                ctx.skipped(source.site.scope, f"{weight.name} is not refitted: other layers share it")
                continue
            wanted = [_without_bias(values, output, ctx) for values in stage.values(_yields(output))]
            take_over(graph, source, latent[source])
            stage.refresh()
            entering = (values[output.input(0)] for values in stage.values([output.input(0)]))
            fitted = refitted(ctx.value(weight.expr), zip(entering, wanted, strict=True))
            weight.expr = ctx.spill(weight.name, fitted.to(weight.storage))
        if not left:
            break


def _yields(output: Node) -> list[Value]:
    """What ``output`` yields, and its bias where that is computed."""
    bias = output.optional_input(2)
    return [output.output] if bias is None or isinstance(bias, Param) else [output.output, bias]


def _without_bias(values: Mapping[Value, Tensor], output: Node, ctx: Context) -> Tensor:
    """What the matrix of ``output`` yields, [.., D]."""
    bias = output.optional_input(2)
    if bias is None:
        return values[output.output]
    return values[output.output] - (ctx.value(bias.expr) if isinstance(bias, Param) else values[bias])
