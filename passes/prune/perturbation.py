"""Rank indices by what the model's output changes by without them, one by one: no gradient, no task (LD-Pruner, arXiv
2404.11936). The distance is that of ``compiler.calibration.fidelity``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from compiler.calibration.fidelity import Fidelity
from compiler.ir.graph import Graph
from compiler.ir.layers import copy_of
from compiler.rewrite.removal import remove
from passes.prune.places import Place, matching
from passes.prune.ranking import Ranking, summed


def perturbed(graph: Graph, places: Sequence[Place], batches: Sequence[Mapping[str, Tensor]]) -> dict[Place, Ranking]:
    """The ranking of every place; what goes is predicted to cost the sum of what each index alone does."""
    fidelity = Fidelity(graph, batches)
    return {place: summed(_distances(graph, place, fidelity)) for place in places}


def _distances(graph: Graph, place: Place, fidelity: Fidelity) -> Tensor:
    """How far from the original the model is without each index, float64 [size]."""
    return torch.tensor([fidelity.distance(_without(graph, place, index)) for index in range(place.size)]).double()


def _without(graph: Graph, place: Place, index: int) -> Graph:
    trial = copy_of(graph)
    there = matching(trial, [place])[place]
    kept = [other for other in range(place.size) if other != index]
    remove(trial, dict.fromkeys(there.groups, kept), numbered=place.kind == "experts")
    return trial
