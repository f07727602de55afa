"""Places: weights that can be sparsified, and how many of their elements remain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from compiler.allocate import Option, allocate
from compiler.calibration.products import matrix_shape, products
from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context

STEPS = 20  # parts of a matrix that it may keep, when the parts may differ


@dataclass(frozen=True)
class Pattern:
    """``kept`` of each ``of`` consecutive inputs remain."""

    kept: int
    of: int


Part = int | Pattern
"""What remains of a matrix: so many elements wherever they are, or a pattern."""

Parts = Mapping["Place", Part]


@dataclass(frozen=True)
class Place:
    """A weight as matrices [rows, columns]: ``experts`` of them in a stack. ``nodes`` are the products with it."""

    param: Param
    nodes: tuple[Node, ...]

    @property
    def stacked(self) -> bool:
        return self.nodes[0].op.name == "experts"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, rows and columns."""
        return matrix_shape(self.param)

    @property
    def size(self) -> int:
        """The elements of one matrix."""
        return self.shape[1] * self.shape[2]

    def kept(self, part: Part) -> int:
        """The elements of one matrix that remain."""
        return part if isinstance(part, int) else self.size // part.of * part.kept


def places_of(graph: Graph, ctx: Context, params: Sequence[Param], pattern: Pattern | None) -> list[Place]:
    """Those of ``params`` that can be sparsified; the others are reported as skipped.

    Raises PassError when there are none.
    """
    known = products(graph)
    found: list[Place] = []
    for param in params:
        reason = _obstacle(param, known.get(param, []), pattern)
        if reason:
            ctx.skipped(param.name, reason)
        else:
            found.append(Place(param, tuple(known[param])))
    if not found:
        raise PassError(
            "none of the selected weights can be sparsified",
            option="pattern" if pattern else "where",
            remedy="choose an M that divides their inputs"
            if pattern
            else "`where: linear` selects the matrices that can be",
        )
    return found


def _obstacle(param: Param, nodes: Sequence[Node], pattern: Pattern | None) -> str:
    """Why ``param`` cannot be sparsified; "" when it can."""
    if len(nodes) != len(param.users):
        kinds = sorted({node.op.name for node in param.users if node not in nodes})
        return f"it is read by {', '.join(kinds)} as well" if nodes else f"it is read by {', '.join(kinds)}"
    if pattern and matrix_shape(param)[2] % pattern.of:
        return f"its {matrix_shape(param)[2]} inputs are no multiple of {pattern.of}"
    return ""


def uniform(places: Sequence[Place], keep: float) -> dict[Place, Part]:
    """The same part of every matrix."""
    return {place: _part(place, keep) for place in places}


def by_layer(places: Sequence[Place], losses: Mapping[Place, Sequence[float]], keep: float) -> dict[Place, Part]:
    """The parts of least predicted loss that hold no more than ``keep`` of all elements.

    ``losses`` says for ``options(place, keep)`` what they lose.
    """
    counts = [options(place, keep) for place in places]
    ways = [
        [Option(place.shape[0] * count, loss) for count, loss in zip(own, losses[place], strict=True)]
        for place, own in zip(places, counts, strict=True)
    ]
    budget = sum(place.shape[0] * _part(place, keep) for place in places)
    chosen = allocate(ways, budget)
    return {place: own[index] for place, own, index in zip(places, counts, chosen, strict=True)}


def options(place: Place, keep: float) -> list[int]:
    """How many elements a matrix may keep: the even part, and steps of all."""
    return sorted({_part(place, part) for part in (keep, *(step / STEPS for step in range(1, STEPS + 1)))})


def _part(place: Place, keep: float) -> int:
    """To the nearest element, and at least one."""
    return max(1, round(keep * place.size))
