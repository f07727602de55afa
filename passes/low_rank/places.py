"""Places: weights that can be factorised, and how many numbers a factorisation of them holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Param
from compiler.pipeline import Context
from compiler.products import matrix_shape, products


@dataclass(frozen=True)
class Place:
    """One weight, or several that read the same input: matrices [rows, columns], stacked, that get one first factor."""

    params: tuple[Param, ...]

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
        return self.kind == "pivoted" or (self.kind == "auto" and rank**2 > place.height)

    def size(self, place: Place, rank: int) -> int:
        """The numbers that factors of ``rank`` hold, an order of rows and new biases among them."""
        height = place.height
        order = height - rank**2 if self.pivoted(place, rank) else 0
        return rank * (height + place.columns) + order + (self.new_bias(place) if self.bias else 0)

    def new_bias(self, place: Place) -> int:
        return sum(rows for param, rows in zip(place.params, place.rows, strict=True) if bias_of(param) is None)

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


def sharing(places: Sequence[Place]) -> list[list[Place]]:
    """``places`` by the input that they read: linear maps with one use each. A place that shares none is alone."""
    found: dict[object, list[Place]] = {}
    for place in places:
        (param,) = place.params
        node = param.single_user()
        shared = node.input(0) if node is not None and node.op.name == "linear" else param
        found.setdefault(shared, []).append(place)
    return list(found.values())
