"""A rank for every layer: where a layer's latent matters more, it gets more of the same cache.

How much a layer matters is measured: the distance of the whole model from the original when that layer alone is
converted. Between ranks a layer's distance is taken to follow its first-order error. The shared allocator then spends
the cache; the result is kept only where the converted model as a whole is nearer to the original than with one rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from compiler.allocate import Option, allocate
from compiler.calibration.fidelity import Fidelity
from passes.gqa_to_mla.latent import Layout, largest_rank, latent_maps
from passes.gqa_to_mla.measured import Measured
from passes.gqa_to_mla.trial import Trials

SHARES = (0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.45, 1.7)  # of the uniform rank


def by_layer(trials: Trials, uniform: Sequence[Layout], probe: Fidelity) -> list[Layout]:
    """Layouts of the same total cache as ``uniform``. ``probe`` measures one layer at a time: little data will do."""
    measured = list(trials.measured.values())
    choices = [_choices(own, layout) for own, layout in zip(measured, uniform, strict=True)]
    options: list[list[Option]] = []
    for index, (own, layout) in enumerate(zip(measured, uniform, strict=True)):
        alone = [layout if place == index else None for place in range(len(uniform))]
        distance = max(0.0, trials.distance(alone, probe))
        analysis = own.analysis()
        errors = {choice: latent_maps(analysis, choice, 0).error for choice in choices[index]}
        base = errors[layout]
        options.append(
            [Option(choice.cached, distance * errors[choice] / base if base else 0.0) for choice in choices[index]]
        )
    chosen = allocate(options, sum(layout.cached for layout in uniform))
    return [own[index] for own, index in zip(choices, chosen, strict=True)]


def _choices(own: Measured, layout: Layout) -> list[Layout]:
    """Ranks around the uniform one, itself among them."""
    largest = largest_rank(own.source, layout.kept)
    ranks = sorted({min(largest, max(1, round(layout.rank * share))) for share in SHARES} | {layout.rank})
    return [Layout(rank, layout.kept) for rank in ranks]
