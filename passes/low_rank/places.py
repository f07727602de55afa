"""Places: weights that can be factorised, and how many numbers a factorisation of them holds."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from compiler.calibration.products import matrix_shape
from compiler.ir.graph import Param


@dataclass(frozen=True)
class Place:
    """One weight, or several that read the same input: matrices [rows, columns], stacked, that get one first factor."""

    params: tuple[Param, ...]

    pivots: ClassVar[bool] = True
    """Whether its first factor can be some of its outputs."""
    repeats: ClassVar[bool] = False
    """Whether the module of each weight applies the first factor."""

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
    def shape(self) -> tuple[int, int]:
        """The sizes of the matrix that is factorised."""
        return self.height, self.columns

    @property
    def words(self) -> str:
        """How its factors are stored, where that is not the form's choice."""
        return ""

    @property
    def full(self) -> int:
        """The numbers that the weights hold now."""
        return self.height * self.columns

    @property
    def name(self) -> str:
        """The module that holds the factors: the weight's own, or one named after all of those that share."""
        if len(self.params) == 1:
            return module_of(self.params[0].name)
        parts = [module_of(param.name).rpartition(".") for param in self.params]
        return f"{parts[0][0]}.shared_{'_'.join(part[2] for part in parts)}"

    @property
    def most(self) -> int:
        """The largest rank."""
        return min(self.height, self.columns)

    def numbers(self, rank: int) -> int:
        """The numbers that factors of ``rank`` hold, as a pair where the form leaves that open, without new biases."""
        return rank * (self.height + self.columns)

    @property
    def unbiased(self) -> int:
        """The outputs that have no bias."""
        return sum(rows for param, rows in zip(self.params, self.rows, strict=True) if bias_of(param) is None)

    def apart(self) -> list[Place]:
        """Every weight as a place of its own."""
        return [Place((param,)) for param in self.params]


def module_of(name: str) -> str:
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
        return place.numbers(rank) + order + (place.unbiased if self.bias else 0)

    def largest(self, place: Place, numbers: float) -> int:
        """The largest rank whose factors hold at most ``numbers``; 0 when there is none."""
        low, high = 0, place.most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.size(place, middle) <= numbers else (low, middle - 1)
        return low


def bias_of(param: Param) -> Param | None:
    """The bias of the linear maps or convolutions of ``param``."""
    bias = next(iter(param.users)).optional_input(2)
    return bias if isinstance(bias, Param) else None
