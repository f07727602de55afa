"""How many indices of every place remain, and which layers: alike in all places of a kind, or by predicted cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from compiler.allocate import Option, allocate
from compiler.errors import PassError
from compiler.ir.graph import Param
from passes.prune.depth import Block
from passes.prune.places import Place
from passes.prune.ranking import Ranking

Counts = Mapping[Place, int]
Rankings = Mapping[Place, Ranking]


@dataclass(frozen=True)
class Choice:
    """What remains of every place, and the layers that go."""

    counts: Counts
    gone: tuple[Block, ...] = ()


class Budget(Protocol):
    """What a choice spends, and how much of it there is: ``most``. ``option`` is where the recipe says so."""

    @property
    def option(self) -> str: ...

    @property
    def most(self) -> float: ...

    def cost(self, place: Place, count: int) -> float:
        """What ``place`` takes when ``count`` of it remain and all others are as they are."""
        ...

    def total(self, counts: Counts, gone: Sequence[Block]) -> float:
        """What the model takes. Places that ``counts`` does not name keep all."""
        ...


@dataclass(frozen=True)
class Numbers:
    """The budget of ``keep``: how many numbers of ``params`` remain."""

    params: Collection[Param]
    most: float
    option: str = "keep"

    def cost(self, place: Place, count: int) -> float:
        return float(count * place.cost)

    def total(self, counts: Counts, gone: Sequence[Block]) -> float:
        lost = {param for block in gone for param in block.params}
        left = {param: float(param.type.numel) for param in self.params if param not in lost}
        for place, count in counts.items():
            for param in place.params:
                if param in left:
                    left[param] *= count / place.size
        return sum(left.values())


ALIGNED = ("channels", "hidden")
"""Kinds that remain in multiples of ``align``."""
ROUNDING = 1e-6  # of a budget: sums of floats

Share = Callable[[Rankings, int, Budget, float], Counts]


def options(place: Place, align: int) -> list[int]:
    """The numbers of indices that may remain, from all down: of channels and widths multiples of ``align``."""
    step = align if place.kind in ALIGNED else 1
    return [place.size, *(n for n in range(place.size - 1, place.least - 1, -1) if n % step == 0)]


def uniform(rankings: Rankings, align: int, budget: Budget, allowed: float) -> Counts:
    """As many in all places of a kind and size, the predicted loss being least; without rankings the nearest to even.

    ``allowed`` is what the places may take of ``budget``. Raises PassError when that cannot be reached.
    """
    alike: dict[tuple[str, int], list[Place]] = {}
    for place in rankings:
        alike.setdefault((place.kind, place.size), []).append(place)
    return _shared(list(alike.values()), rankings, align, budget, allowed)


def by_layer(rankings: Rankings, align: int, budget: Budget, allowed: float) -> Counts:
    """The least predicted loss for what is ``allowed``. Raises PassError when that cannot be reached."""
    return _shared([[place] for place in rankings], rankings, align, budget, allowed)


def _shared(
    classes: Sequence[Sequence[Place]], rankings: Rankings, align: int, budget: Budget, allowed: float
) -> Counts:
    """A number for all places of each class."""
    numbers = [options(own[0], align) for own in classes]
    ways = [
        [Option(sum(budget.cost(p, n) for p in own), sum(_loss(p, n, rankings) for p in own)) for n in counts]
        for own, counts in zip(classes, numbers, strict=True)
    ]
    if sum(min(way.cost for way in own) for own in ways) > allowed:
        least = {place: counts[-1] for own, counts in zip(classes, numbers, strict=True) for place in own}
        part = ceil(1000 * budget.total(least, ()) / budget.total({}, ())) / 10
        aligned = align > 1 and any(place.kind in ALIGNED for place in least)
        raise PassError(
            f"that is less than what must remain of these dimensions: {part:.1f} % of all is then left",
            option=budget.option,
            remedy="keep more, or add kinds to `what`" + (f", or lower `align` ({align})" if aligned else ""),
        )
    chosen = allocate(ways, allowed) if ways else []
    return {place: counts[index] for own, counts, index in zip(classes, numbers, chosen, strict=True) for place in own}


def _loss(place: Place, count: int, rankings: Rankings) -> float:
    """The predicted loss; where none is known, the square of what goes, so that all kinds lose alike."""
    gone = 1 - count / place.size
    return float(rankings[place].losses[count]) or place.cost * place.size * gone**2 * 1e-12


def within(share: Share, rankings: Rankings, align: int, budget: Budget, gone: Sequence[Block]) -> Counts:
    """What ``share`` makes of the budget, or of less, such that the model takes at most all of it.

    What loses along two axes saves less than both places count, so the first attempt may take too much.
    """
    whole = budget.total({}, gone) - sum(budget.cost(place, place.size) for place in rankings)
    allowed = budget.most - whole
    counts = share(rankings, align, budget, allowed)
    while (found := budget.total(counts, gone)) > budget.most * (1 + ROUNDING):
        allowed -= max(found - budget.most, ROUNDING * budget.most)
        counts = share(rankings, align, budget, allowed)
    return counts


def choose(rankings: Rankings, alone: Mapping[Block, float], align: int, budget: Budget, share: Share) -> Choice:
    """The number of layers to take out whose predicted loss, with that of the places then left, is least.

    ``alone`` is what the model loses without each layer. Raises PassError when nothing is within the budget.
    """
    order = sorted(alone, key=lambda block: alone[block])
    found: list[tuple[float, Choice]] = []
    failed: PassError | None = None
    for number in range(max(1, len(order))):
        gone = tuple(order[:number])
        lost = frozenset(param for block in gone for param in block.params)
        left = {place: ranking for place, ranking in rankings.items() if not lost & place.params.keys()}
        try:
            counts = within(share, left, align, budget, gone)
        except PassError as error:
            failed = error
            continue
        loss = sum(float(left[place].losses[kept]) for place, kept in counts.items())
        found.append((loss + sum(alone[block] for block in gone), Choice(counts, gone)))
        if not any(alone.values()):
            break
    if not found:
        raise failed or PassError("nothing would remain", option=budget.option, remedy="keep more")
    return min(found, key=lambda pair: pair[0])[1]
