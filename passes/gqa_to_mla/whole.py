"""The conversion that cuts nothing, for attention that no published latent attention holds: it needs no calibration."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compiler.ir.graph import Graph
from compiler.pipeline import Context
from passes.gqa_to_mla.latent import LatentMaps, Layout, analyse, largest_rank, latent_maps
from passes.gqa_to_mla.moments import Moments
from passes.gqa_to_mla.reduce import planned_maps
from passes.gqa_to_mla.source import Source
from passes.gqa_to_mla.truncate import Form, Truncation, take_over


def whole(source: Source) -> Layout:
    """The widths at which nothing is cut."""
    kept = (source.groups,) * source.pairs
    return Layout(largest_rank(source, kept), kept)


def convert_whole(graph: Graph, ctx: Context, sources: Sequence[Source]) -> None:
    """Rewrite ``sources`` as latent attention that computes and caches what they did."""
    conversion = Truncation(graph, Form(standard=False), ctx.spill, ctx.value, {})
    for source in sources:
        layout = whole(source)
        maps = planned_maps(source, layout) if ctx.planned else _maps(source, layout)
        ctx.rewrote(
            source.site.scope,
            f"a latent of {layout.rank} and a rotary key of {layout.rotary_dim} for {source.groups} groups",
            cache_values_before=source.cached,
            cache_values_after=layout.cached,
            query_rows_before=source.heads * source.head_dim,
            query_rows_after=maps.query.shape[0] * maps.query.shape[1],
        )
        take_over(graph, source, conversion.convert(source, layout, maps))


def _maps(source: Source, layout: Layout) -> LatentMaps:
    """Matrices that only sort a token's numbers: to keep all of them, none has to be known to matter."""
    heads, d, v, numbers = source.heads, source.head_dim, source.value_dim, source.cached
    alike = Moments(
        phasor=torch.zeros(heads, source.pairs, 2, dtype=torch.float64),
        frozen=torch.ones(heads, source.pairs, dtype=torch.float64),
        queries=_identities(heads, d),
        keys=_identities(1, numbers)[0],
        key_mean=torch.zeros(numbers, dtype=torch.float64),
        values=_identities(1, numbers)[0],
        outputs=_identities(heads, v),
        collision=torch.ones(heads, dtype=torch.float64),
    )
    return latent_maps(analyse(source, alike), layout)


def _identities(count: int, width: int) -> torch.Tensor:
    return torch.eye(width, dtype=torch.float64).repeat(count, 1, 1)
