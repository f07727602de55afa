"""What gets a number of bits: a weight, or each matrix of a stack of experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compiler.calibration.products import matrix_shape
from compiler.ir.graph import Param
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import concat, index
from compiler.weights.ops.codec import Codec
from compiler.weights.ops.expert_widths import experts_of_widths
from compiler.weights.ops.integer import Integer

Widths = int | tuple[int, ...]
Bits = Mapping[Param, Widths]
"""By weights how many bits they get; of a stack of experts those of each, where they differ."""


@dataclass(frozen=True)
class Matrix:
    """The weight ``param``, or the matrix of one ``expert`` of that stack."""

    param: Param
    expert: int | None = None

    @property
    def size(self) -> int:
        """In numbers."""
        return self.param.type.numel // (1 if self.expert is None else matrix_shape(self.param)[0])

    def bits(self, bits: Bits) -> int:
        """What it gets by ``bits``."""
        own = bits[self.param]
        return own if isinstance(own, int) else own[self.expert or 0]

    def __str__(self) -> str:
        return self.param.name if self.expert is None else f"{self.param.name}[{self.expert}]"


def matrices(params: Sequence[Param], *, apart: bool) -> list[list[Matrix]]:
    """Of ``params`` that get the same bits, what does: all of them, or, ``apart``, each expert of a stack by itself."""
    experts = matrix_shape(params[0])[0] if apart and params[0].type.rank == 3 else 1
    if experts == 1:
        return [[Matrix(param) for param in params]]
    return [[Matrix(param, expert) for param in params] for expert in range(experts)]


def bits_of(widths: Mapping[Matrix, int]) -> dict[Param, Widths]:
    """What matrices get, by weights. All experts of a stack are there, in order, or none."""
    found: dict[Param, list[int]] = {}
    for matrix, width in widths.items():
        found.setdefault(matrix.param, []).append(width)
    return {param: own[0] if len({*own}) == 1 else tuple(own) for param, own in found.items()}


@dataclass(frozen=True)
class Experts:
    """The number systems of a stack, one for ``each`` matrix, which differ in nothing but their bits."""

    each: tuple[Integer, ...]

    by_rows = True

    def reading(self, value: Callable[[Expr], object]) -> Experts:
        return self

    def nearest(self, weight: Expr) -> Expr:
        """``weight`` [experts, out, in] fitted and rounded to nearest, each matrix by its own codec."""
        order: list[int] = []
        found: list[Expr] = []
        for codec in dict.fromkeys(self.each):
            own = [expert for expert, other in enumerate(self.each) if other == codec]
            found.append(codec.nearest(index(weight, 0, own)))
            order += own
        places = [order.index(expert) for expert in range(len(order))]
        columns = zip(*(expr.args for expr in found), strict=True)
        return self.expression([index(concat(list(parts), 0), 0, places) for parts in columns])

    def expression(self, parts: Sequence[Expr]) -> Expr:
        """The stack that codes, scales and zero points, each of all experts, make up."""
        return experts_of_widths(parts, [codec.bits for codec in self.each], self.each[0].group)


AnyCodec = Codec | Experts


def of_expert(codec: AnyCodec, expert: int) -> Codec:
    """The codec of one matrix of a stack."""
    return codec.each[expert] if isinstance(codec, Experts) else codec
