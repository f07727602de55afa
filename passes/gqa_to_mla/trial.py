"""Try a conversion on a copy of the graph, and measure how far from the original it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from compiler.calibration.fidelity import Fidelity
from compiler.ir.facts import attention_sites
from compiler.ir.graph import Graph, Node
from compiler.ir.layers import copy_of
from compiler.pipeline import Context
from passes.gqa_to_mla.latent import Layout, latent_maps
from passes.gqa_to_mla.measured import Measured
from passes.gqa_to_mla.source import Source, compressible
from passes.gqa_to_mla.truncate import Truncation, form_of, take_over

ROUNDS = 1  # of least squares in a trial, which only has to rank


@dataclass(frozen=True)
class Trials:
    """Conversions of one graph, whose attentions are ``measured``."""

    graph: Graph
    ctx: Context
    measured: Mapping[Node, Measured]

    def distance(self, layouts: Sequence[Layout | None], fidelity: Fidelity) -> float:
        """The distance when every attention that has a layout is converted to it, without refitting."""
        trial = copy_of(self.graph)
        found = [compressible(site) for site in attention_sites(trial)]
        sources = [source for source in found if isinstance(source, Source)]
        planned = [
            (source, own, layout)
            for source, own, layout in zip(sources, self.measured.values(), layouts, strict=True)
            if layout is not None
        ]
        form = form_of(trial, [part[0] for part in planned], [part[2] for part in planned])
        conversion = Truncation(trial, form, self.ctx.spill, self.ctx.value, {})
        for source, own, layout in planned:
            maps = latent_maps(replace(own.analysis(), source=source), layout, ROUNDS)
            take_over(trial, source, conversion.convert(source, layout, maps))
        trial.prune()
        return fidelity.distance(trial)
