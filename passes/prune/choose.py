"""How many indices of every place remain: alike in all places of a kind, or by predicted cost."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from compiler.allocate import Option, allocate
from compiler.errors import PassError
from compiler.ir.graph import Param
from passes.prune.places import Place
from passes.prune.ranking import Ranking

Counts = dict[Place, int]


def options(place: Place, align: int) -> list[int]:
    """The numbers of indices that may remain, from all down: of channels multiples of ``align``."""
    step = align if place.kind == "channels" else 1
    return [place.size, *(n for n in range(place.size - 1, place.least - 1, -1) if n % step == 0)]


def uniform(places: Sequence[Place], rankings: Mapping[Place, Ranking], align: int, budget: float) -> Counts:
    """As many in all places of a kind and size, the predicted loss being least; without rankings the nearest to even.

    ``budget`` is how many numbers the places may hold. Raises PassError when that cannot be reached.
    """
    alike: dict[tuple[str, int], list[Place]] = {}
    for place in places:
        alike.setdefault((place.kind, place.size), []).append(place)
    return _shared(list(alike.values()), rankings, align, budget)


def by_layer(places: Sequence[Place], rankings: Mapping[Place, Ranking], align: int, budget: float) -> Counts:
    """The least predicted loss within ``budget``. Raises PassError when that cannot be reached."""
    return _shared([[place] for place in places], rankings, align, budget)


def _shared(classes: Sequence[Sequence[Place]], rankings: Mapping[Place, Ranking], align: int, budget: float) -> Counts:
    """A number for all places of each class."""
    numbers = [options(own[0], align) for own in classes]
    ways = [
        [Option(count * sum(p.cost for p in own), sum(_loss(p, count, rankings) for p in own)) for count in counts]
        for own, counts in zip(classes, numbers, strict=True)
    ]
    if sum(own[-1].cost for own in ways) > budget:
        raise PassError(
            "that is less than what must remain of these dimensions",
            option="keep",
            remedy=f"keep more, add kinds to `what`, or lower `align` ({align})",
        )
    chosen = allocate(ways, budget) if ways else []
    return {place: counts[index] for own, counts, index in zip(classes, numbers, chosen, strict=True) for place in own}


def within(share: Callable[[float], Counts], params: Collection[Param], budget: float, most: float) -> Counts:
    """What ``share`` makes of ``budget``, or of less, such that at most ``most`` numbers of ``params`` remain.

    A weight that loses along both axes saves less than both places count, so the first budget may be too large.
    """
    counts = share(budget)
    while (found := numbers(params, counts)) > most:
        budget -= max(found - most, 1.0)
        counts = share(budget)
    return counts


def numbers(params: Collection[Param], counts: Mapping[Place, int]) -> float:
    """How many numbers of ``params`` remain."""
    left = {param: float(param.type.numel) for param in params}
    for place, count in counts.items():
        for param in place.params:
            if param in left:
                left[param] *= count / place.size
    return sum(left.values())


def _loss(place: Place, count: int, rankings: Mapping[Place, Ranking]) -> float:
    """The predicted loss; where none is known, the square of what goes, so that all kinds lose alike."""
    predicted = float(rankings[place].losses[count]) if place in rankings else 0.0
    gone = 1 - count / place.size
    return predicted or place.cost * place.size * gone**2 * 1e-12
