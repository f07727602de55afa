"""What tests of the truncating latent attention share: calibration batches, analyses, conversions with given widths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from compiler.calibration.sweep import sweep
from compiler.ir.execute import run
from compiler.ir.facts import attention_sites
from compiler.ir.graph import Graph
from compiler.pipeline import Pipeline, Report
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import Expr, load
from compiler.weights.spill import SpillSource
from passes.gqa_to_mla import GqaToMla
from passes.gqa_to_mla.build import add_zero_bias
from passes.gqa_to_mla.latent import Analysis, LatentMaps, Layout, analyse, largest_rank, latent_maps
from passes.gqa_to_mla.moments import measure
from passes.gqa_to_mla.source import Source, compressible, pair_rows
from passes.gqa_to_mla.truncate import Form, Truncation, take_over
from tests.families import VOCABULARY


def token_ids(batch: int = 2, tokens: int = 24, seed: int = 1, vocabulary: int = VOCABULARY) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, vocabulary, (batch, tokens), generator=generator)}


def batches(count: int = 4, tokens: int = 40, seed: int = 7, vocabulary: int = VOCABULARY) -> list[dict[str, Tensor]]:
    return [token_ids(1, tokens, 100 * seed + index, vocabulary) for index in range(count)]


def analyses(graph: Graph, given: Sequence[Mapping[str, Tensor]]) -> list[Analysis]:
    """Every attention of ``graph`` as calibration sees it, in order."""
    sources = [compressible(site) for site in attention_sites(graph)]
    found: list[Analysis] = []
    for stage in sweep(graph, given):
        for source in sources:
            assert isinstance(source, Source), source
            if source.site.node in stage.nodes:
                found.append(analyse(source, measure(stage, source, weight_of(graph, source))))
    return found


def moved(found: Sequence[Analysis], graph: Graph) -> list[Analysis]:
    """The same analyses for a copy of their graph."""
    sources = [compressible(site) for site in attention_sites(graph)]
    return [replace(one, source=source) for one, source in zip(found, sources, strict=True)]


def weight_of(graph: Graph, source: Source) -> Tensor:
    return evaluate([source.output_weight.expr], graph.sources)[0]


def whole(source: Source) -> Layout:
    """The layout in which nothing is cut."""
    kept = (source.groups,) * source.pairs
    return Layout(largest_rank(source, kept), kept)


def convert(graph: Graph, found: Sequence[Analysis], layouts: Sequence[Layout], form: Form) -> list[LatentMaps]:
    """Put latent attention of ``layouts`` in the place of every attention of ``graph``, without refitting."""
    spill = SpillSource()
    graph.sources["spill"] = spill
    conversion = Truncation(graph, form, partial(_keep, spill), partial(_read, graph), {})
    maps = [latent_maps(one, layout) for one, layout in zip(found, layouts, strict=True)]
    for one, layout, made in zip(found, layouts, maps, strict=True):
        take_over(graph, one.source, conversion.convert(one.source, layout, made))
        if form.biased and len(one.source.output.inputs) == 2:
            add_zero_bias(graph, one.source.output)
    graph.prune()
    return maps


def _keep(spill: SpillSource, name: str, tensor: Tensor) -> Expr:
    key = spill.add(name, tensor)
    return load("spill", key, spill.types[key])


def _read(graph: Graph, expr: Expr) -> Tensor:
    return evaluate([expr], graph.sources)[0]


def reduced(graph: Graph, given: Sequence[Mapping[str, Tensor]], *, planned: bool = False, **options: object) -> Report:
    """The pass itself on ``graph``, calibrated on ``given``."""
    return Pipeline([GqaToMla(**options)]).run(graph, planned=planned, calibration=lambda _: given)


def first_output(graph: Graph, given: Mapping[str, Tensor]) -> Tensor:
    return next(iter(run(graph, given).values()))


def relative_square(found: Tensor, wanted: Tensor) -> float:
    """The square error as a part of what is wanted."""
    return float((found - wanted).double().square().sum() / wanted.double().square().sum())


def complex_heads(source: Source, heads: Tensor) -> Tensor:
    """The rotary pairs of heads [.., d] as complex numbers [.., pairs]."""
    real, imaginary = pair_rows(source)
    return torch.complex(heads[..., real], heads[..., imaginary])
