"""The truncating conversion: measure every attention, choose widths, rewrite layer by layer, refit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibrate import Stage, sweep
from compiler.fidelity import spread
from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context
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

Batches = Sequence[Mapping[str, Tensor]]


def reduce_cache(graph: Graph, ctx: Context, options: GqaToMla, sources: Sequence[Source]) -> None:
    """Rewrite ``sources`` of ``graph`` with the widths that ``options`` ask for."""
    batches = ctx.calibration()
    measured = {} if ctx.planned else _measure(graph, sources, spread(batches, MOMENT_TOKENS), ctx)
    layouts = choose(graph, ctx, options, sources, measured, batches)
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
    for stage in sweep(graph, batches):
        for source in _in_stage(stage, list(latent)):
            left.discard(source)
            output, weight = source.output, source.output_weight
            if len(weight.users) > 1:
                take_over(graph, source, latent[source])
                ctx.skipped(source.site.scope, f"{weight.name} is not refitted: other layers share it")
                continue
            bias = output.optional_input(2)
            wanted = [values[output.output] for values in stage.values([output.output])]
            take_over(graph, source, latent[source])
            stage.refresh()
            entering = (values[output.input(0)] for values in stage.values([output.input(0)]))
            offset = ctx.value(bias.expr) if isinstance(bias, Param) else 0
            pairs = ((x, y - offset) for x, y in zip(entering, wanted, strict=True))
            fitted = refitted(ctx.value(weight.expr), pairs)
            weight.expr = ctx.spill(weight.name, fitted.to(weight.storage))
        if not left:
            break
