"""TransMLA's result as a graph of ours: the start that a published conversion gives to training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.peers_mla.transmla import LatentAttention, calibrate, pair
from compiler.ir.facts import attention_sites
from compiler.ir.graph import Graph
from compiler.pipeline import Context, Pass
from passes.gqa_to_mla.latent import LatentMaps, Layout
from passes.gqa_to_mla.source import Source, compressible
from passes.gqa_to_mla.truncate import Truncation, form_of, take_over


@dataclass(frozen=True)
class TransMla(Pass):
    """Write the attention that TransMLA makes of ``model``, calibrated on ``windows``, as latent attention."""

    model: Any
    windows: Tensor
    rank: int
    rope_dim: int

    exact_when: ClassVar = None

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises ValueError when the method cannot have this width."""
        sources = [source for site in attention_sites(graph) if isinstance(source := compressible(site), Source)]
        moments = calibrate(self.model, self.windows, self.rope_dim)
        layout = layout_of(sources[0], self.rope_dim, self.rank)
        conversion = Truncation(graph, form_of(graph, sources, [layout] * len(sources)), ctx.spill, ctx.value, {})
        for source, layer, joint in zip(sources, self.model.base_model.layers, moments, strict=True):
            maps = as_maps(source, layer.self_attn, joint, self.rank)
            take_over(graph, source, conversion.convert(source, layout, maps))
            ctx.rewrote(source.site.scope, f"TransMLA with a latent of {self.rank} and a rotary key of {self.rope_dim}")
        graph.prune()


def layout_of(source: Source, rope_dim: int, rank: int) -> Layout:
    """One component at every ``step``-th rotary pair, as the method has it."""
    step = 2 * source.pairs // rope_dim
    return Layout(rank, tuple(int(pair % step == 0) for pair in range(source.pairs)))


def as_maps(source: Source, attention: LatentAttention, joint: Tensor, rank: int) -> LatentMaps:
    """What ``attention`` computes, as matrices on keys and values and on queries (see ``LatentMaps``)."""
    basis, kv = attention.basis.double(), source.groups * source.head_dim
    kept = interleaved(basis[:, : attention.rope_dim])
    down, back = pair(joint, basis, attention.rope_dim, rank)
    keys, values = (half.unflatten(0, (source.groups, -1))[source.group_of] for half in back.split(kv))
    blocks = kept.unflatten(0, (source.groups, -1))[source.group_of].mT
    whole = torch.eye(source.head_dim, dtype=torch.float64).expand(source.heads, -1, -1)
    return LatentMaps(
        down=down,
        rotary_key=torch.nn.functional.pad(kept.mT, (0, source.cached - kv)),
        query=torch.cat((whole, blocks), 1),
        up=torch.cat((keys, values), 1).flatten(0, 1),
        freed=0.0,
        key_error=0.0,
        value_error=0.0,
    )


def interleaved(columns: Tensor) -> Tensor:
    """Columns of all real parts and then all imaginary ones, pair by pair."""
    return torch.stack(columns.chunk(2, dim=1), dim=2).flatten(1)
