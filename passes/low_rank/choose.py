"""Which ranks: the same part of every weight, or what the shared allocator makes of the predicted costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from compiler.allocate import Option, allocate
from compiler.errors import PassError
from passes.low_rank.places import Form, Place

STEPS = 24  # ranks that a place may get
WORTHWHILE = 0.97  # of a weight's numbers: factors that hold more than that are two products for nothing
MOST = 48  # options that weights with one input may get between them


@dataclass(frozen=True)
class Ranked:
    """A place and the rank that it gets."""

    place: Place
    rank: int


Choice = tuple[Ranked, ...]
"""What is factorised; other places stay as they are."""

Costs = Mapping[Place, torch.Tensor]
"""By place, the cost that each rank more saves, largest first."""


@dataclass(frozen=True)
class _Way:
    """A way to treat the weights of one input."""

    numbers: int
    cost: float
    choice: Choice


def uniform(places: Sequence[Place], form: Form, keep: float) -> Choice:
    """The largest ranks that keep the part ``keep`` of all numbers, the same part of each weight that can be reduced.

    Raises PassError when that is less than what rank 1 holds.
    """
    budget = keep * sum(place.full for place in places)
    left = list(places)
    while left:
        part = (budget - sum(place.full for place in places if place not in left)) / sum(place.full for place in left)
        small = [place for place in left if not form.largest(place, place.full * part)]
        if not small:
            return tuple(Ranked(place, form.largest(place, place.full * part)) for place in left)
        left = [place for place in left if place not in small]
    raise PassError("`keep` leaves less than a rank of 1", option="keep", remedy="keep more, such as `keep: 80%`")


Group = tuple[Sequence[Place], Place]
"""Weights that may share a first factor, and all of them as one place."""


def allocated(groups: Sequence[Group], costs: Costs, form: Form, keep: float) -> Choice:
    """The least predicted cost within the part ``keep`` of all numbers.

    Weights that share an input (a group) go each for itself or, where ``costs`` knows them as one place, together.
    """
    ways = [_thinned(_ways(group, costs, form)) for group in groups]
    budget = keep * sum(place.full for places, _ in groups for place in places)
    options = [[Option(way.numbers, way.cost) for way in own] for own in ways]
    chosen = allocate(options, budget)
    return tuple(ranked for own, index in zip(ways, chosen, strict=True) for ranked in own[index].choice)


def by_threshold(places: Sequence[Place], costs: Costs, form: Form, keep: float) -> Choice:
    """The ranks that one threshold gives all places, the lowest within the part ``keep`` of all numbers.

    It is for singular values over the largest of their own place (WeLore, arXiv 2407.11239).
    """
    spectra = {place: costs[place] / costs[place].max().clamp_min(torch.finfo(torch.float64).tiny) for place in places}
    steps = torch.cat([*spectra.values(), torch.zeros(1)]).unique()  # squares of thresholds, ascending

    def at(step: int) -> Choice:
        found = [Ranked(place, max(1, int((spectra[place] > steps[step]).sum()))) for place in places]
        return tuple(one for one in found if form.size(one.place, one.rank) <= WORTHWHILE * one.place.full)

    def numbers(choice: Choice) -> int:
        return sum(form.size(one.place, one.rank) - one.place.full for one in choice)

    budget = (keep - 1) * sum(place.full for place in places)
    low, high = 0, len(steps) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if numbers(at(middle)) <= budget else (middle + 1, high)
    return at(low)


def losses(saved: torch.Tensor) -> torch.Tensor:
    """The cost of every rank from 0, of what each rank more saves."""
    return torch.cat([saved.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=saved.dtype)])


def _ways(group: Group, costs: Costs, form: Form) -> list[_Way]:
    found, (places, joint) = [_Way(0, 0.0, ())], group
    for place in places:
        options = _options(place, costs, form)
        found = _thinned(
            [_Way(a.numbers + b.numbers, a.cost + b.cost, a.choice + b.choice) for a in found for b in options]
        )
    return found + (_options(joint, costs, form)[1:] if len(places) > 1 and joint in costs else [])


def _options(place: Place, costs: Costs, form: Form) -> list[_Way]:
    """Leave ``place`` alone, or one of some ranks that save numbers."""
    largest = form.largest(place, WORTHWHILE * place.full)
    ranks = sorted({round(largest * step / STEPS) for step in range(1, STEPS + 1)} - {0})
    lost = losses(costs[place])
    return [
        _Way(place.full, 0.0, ()),
        *(_Way(form.size(place, rank), float(lost[rank]), (Ranked(place, rank),)) for rank in ranks),
    ]


def _thinned(ways: Sequence[_Way]) -> list[_Way]:
    """The ways that none beats in both, evenly spaced in numbers where there are more than ``MOST``."""
    best: list[_Way] = []
    for way in sorted(ways, key=lambda way: (way.numbers, way.cost)):
        if not best or way.cost < best[-1].cost:
            best.append(way)
    if len(best) <= MOST:
        return best
    return [best[round(index * (len(best) - 1) / (MOST - 1))] for index in range(MOST)]
