"""Places: weights that can be factorised, and how many numbers a factorisation of them holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Param
from compiler.ir.layers import Layer, layer_of
from compiler.pipeline import Context
from compiler.products import matrix_shape, products


@dataclass(frozen=True)
class Place:
    """One weight, or several that read the same input: matrices [rows, columns], stacked, that get one first factor."""

    params: tuple[Param, ...]

    pivots: ClassVar[bool] = True
    """Whether its first factor can be some of its outputs."""

    @cached_property
    def rows(self) -> tuple[int, ...]:
        return tuple(matrix_shape(param)[1] for param in self.params)

    @cached_property
    def columns(self) -> int:
        return matrix_shape(self.params[0])[2]

    @property
    def height(self) -> int:
        return sum(self.rows)

    @property
    def full(self) -> int:
        """The numbers that the weights hold now."""
        return self.height * self.columns

    @property
    def name(self) -> str:
        """The module that holds the factors: the weight's own, or one named after all of those that share."""
        if len(self.params) == 1:
            return _module(self.params[0].name)
        parts = [_module(param.name).rpartition(".") for param in self.params]
        return f"{parts[0][0]}.shared_{'_'.join(part[2] for part in parts)}"

    @property
    def unbiased(self) -> int:
        """The outputs that have no bias."""
        return sum(rows for param, rows in zip(self.params, self.rows, strict=True) if bias_of(param) is None)

    def apart(self) -> list[Place]:
        """Every weight as a place of its own."""
        return [Place((param,)) for param in self.params]


class Adjacent(Place):
    """Weights of a kind in adjacent layers, which read different inputs. The first factor is that of each layer."""

    pivots: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return _module(self.params[0].name)


def _module(name: str) -> str:
    """The module of a weight; of a part of a fused one (`qkv.weight.1`), one beside it (`qkv_1`)."""
    part = re.fullmatch(r"(.+?)(?:\.weight)?\.(\d+)", name)
    return f"{part[1]}_{part[2]}" if part else name.removesuffix(".weight")


@dataclass(frozen=True)
class Form:
    """How factors are stored. ``bias``: outputs that have no bias get one."""

    kind: str
    bias: bool

    def pivoted(self, place: Place, rank: int) -> bool:
        """Whether the pivoted form is to be taken: if asked for, or if what it saves is more than its order of rows."""
        return place.pivots and (self.kind == "pivoted" or (self.kind == "auto" and rank**2 > place.height))

    def size(self, place: Place, rank: int) -> int:
        """The numbers that factors of ``rank`` hold, an order of rows and new biases among them."""
        height = place.height
        order = height - rank**2 if self.pivoted(place, rank) else 0
        return rank * (height + place.columns) + order + (place.unbiased if self.bias else 0)

    def largest(self, place: Place, numbers: float) -> int:
        """The largest rank whose factors hold at most ``numbers``; 0 when there is none."""
        low, high = 0, min(place.height, place.columns)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.size(place, middle) <= numbers else (low, middle - 1)
        return low


def bias_of(param: Param) -> Param | None:
    """The bias of the linear maps or convolutions of ``param``."""
    bias = next(iter(param.users)).optional_input(2)
    return bias if isinstance(bias, Param) else None


def places_of(graph: Graph, ctx: Context, params: Sequence[Param]) -> list[Place]:
    """Those of ``params`` that can be factorised, each a place; the others are reported as skipped.

    Raises PassError when there are none.
    """
    known = products(graph)
    found: list[Place] = []
    for param in params:
        reason = _obstacle(param, known.get(param, []))
        if reason:
            ctx.skipped(param.name, reason)
        else:
            found.append(Place((param,)))
    if not found:
        raise PassError("none of the selected weights can be factorised", option="where")
    return found


def _obstacle(param: Param, users: Sequence[Node]) -> str:
    """Why ``param`` cannot be factorised; "" when it can."""
    if any(node.op.name == "experts" for node in param.users):
        return "it is a stack of experts, which are one operation with dense weights"
    if len(users) != len(param.users):
        kinds = sorted({node.op.name for node in param.users if node not in users})
        return f"it is read by {', '.join(kinds)} as well" if users else f"it is read by {', '.join(kinds)}"
    biases = {node.optional_input(2) for node in users}
    if len(biases) > 1 or not all(bias is None or isinstance(bias, Param) for bias in biases):
        return "its products have different biases"
    return ""


def sharing(places: Sequence[Place], share: str) -> list[list[Place]]:
    """``places`` in groups that may share a first factor; one that shares none is alone.

    ``share``: `none`; `input`, linear maps of one use and one layer that read the same value; `layers`, such of the
    same name and shape in two layers that follow each other.
    """
    found: dict[object, list[Place]] = {}
    for place in places:
        found.setdefault(_shared(place, share) or place, []).append(place)
    return list(found.values())


def _shared(place: Place, share: str) -> object:
    """Equal for places that may share; None for one that shares with none."""
    (param,) = place.params
    node = param.single_user()
    if share == "none" or node is None or node.op.name != "linear":
        return None
    layer = layer_of(param.name)
    if share == "input":
        return node.input(0), layer
    return layer and (Layer(layer.stack, layer.index // 2), param.name.removeprefix(layer.scope), param.type)


def together(group: Sequence[Place]) -> Place:
    """The weights of ``group`` as one place."""
    params = tuple(param for place in group for param in place.params)
    return Place(params) if len({layer_of(param.name) for param in params}) == 1 else Adjacent(params)
