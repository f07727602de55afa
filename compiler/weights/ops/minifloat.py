"""Floats of four, six and eight bits: rounding to them, their codes, and codes packed into bytes.

e2m1 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; its code is their place in that list, plus 8 for negative numbers.
e2m3 has the magnitudes 0, 0.125, … 7.5, e3m2 0, 0.0625, … 28; codes are places among them, plus 32 for negative ones.
e4m3 is torch's float8_e4m3fn, whose largest number is 448. Rounding is to nearest, ties to even, and saturates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp, take_rows

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_MAX = 448.0


@dataclass(frozen=True)
class Element:
    """A float of few bits. ``round`` makes float32 of float32, ``encode`` codes, ``decode`` float32."""

    bits: int
    largest: float
    dtype: torch.dtype
    round: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def to_e2m1(x: Tensor) -> Tensor:
    """``x`` rounded to the nearest e2m1, which may be -0."""
    magnitude = x.abs()
    step = 0.5 + 0.5 * (magnitude >= 2) + (magnitude >= 4)
    return magnitude.div_(step).round_().mul_(step).clamp_(max=6.0).copysign_(x)


def e2m1_codes(x: Tensor) -> Tensor:
    """The codes uint8 of ``x`` rounded to e2m1, of which only the low four bits are used."""
    rounded = to_e2m1(x)
    magnitude = rounded.abs()
    place = torch.where(magnitude < 2, 2 * magnitude, torch.where(magnitude < 4, magnitude + 2, magnitude / 2 + 4))
    return place.to(torch.uint8).add_((x < 0).to(torch.uint8), alpha=8)


def e2m1_values(codes: Tensor) -> Tensor:
    """The float32 that codes uint8 stand for."""
    return torch.tensor((*E2M1_VALUES, *(-value for value in E2M1_VALUES)))[codes.int()]


def e4m3_codes(x: Tensor) -> Tensor:
    """``x`` rounded to float8_e4m3fn, saturating."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def exponent_above(x: Tensor) -> Tensor:
    """The least k, int32, with 2^k >= ``x`` > 0."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent with mantissa in [0.5, 1)
    return exponent - (mantissa == 0.5).int()


def power_of_two(exponent: Tensor) -> Tensor:
    """float32 2^exponent."""
    return torch.ldexp(torch.ones(exponent.shape), exponent)


def _small(exponents: int, mantissa: int) -> Element:
    """A float of so many bits of exponent and mantissa, without infinities; the least exponent is that of numbers
    without a leading one, and 1 stands for the middle of exponents."""
    bits, least = 1 + exponents + mantissa, 2 - (1 << exponents - 1)
    index = torch.arange(1 << bits - 1)
    power = (index >> mantissa).clamp(min=1) - 1 + least - mantissa
    magnitudes = torch.ldexp(index - ((index >> mantissa).clamp(min=1) - 1 << mantissa).float(), power)
    largest, table = float(magnitudes[-1]), torch.cat([magnitudes, -magnitudes])

    def steps(magnitude: Tensor) -> Tensor:
        """The exponents of the steps between numbers near ``magnitude``."""
        exponent = (torch.frexp(magnitude).exponent - 1).where(magnitude > 0, least)
        return exponent.clamp(min=least) - mantissa

    def rounded(x: Tensor) -> Tensor:
        magnitude = x.abs()
        step = steps(magnitude)
        return torch.ldexp(torch.ldexp(magnitude, -step).round_(), step).clamp_(max=largest).copysign_(x)

    def codes(x: Tensor) -> Tensor:
        magnitude = rounded(x).abs()
        step = steps(magnitude)
        place = (step + mantissa - least << mantissa) + torch.ldexp(magnitude, -step).int()
        return place.to(torch.uint8).add_((x < 0).to(torch.uint8), alpha=1 << bits - 1)

    return Element(bits, largest, torch.uint8, rounded, codes, lambda given: table[given.int()])


E2M1 = Element(4, E2M1_VALUES[-1], torch.uint8, to_e2m1, e2m1_codes, e2m1_values)
E2M3, E3M2 = _small(2, 3), _small(3, 2)
E4M3 = Element(8, E4M3_MAX, torch.float8_e4m3fn, lambda x: e4m3_codes(x).float(), e4m3_codes, Tensor.float)


def pack_nibbles(codes: Expr) -> Expr:
    """Codes uint8 [..., n] of four bits packed into uint8 [..., n / 2], the first of each pair in the low half.

    Raises OpError when n is odd.
    """
    return apply("pack_nibbles", [codes])


def pack_sextets(codes: Expr) -> Expr:
    """Codes uint8 [..., n] of six bits packed into uint8 [..., 3 n / 4], four into three bytes, little-endian.

    Raises OpError when n is no multiple of four.
    """
    return apply("pack_sextets", [codes])


def _infer_sextets(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    *rows, width = types[0].static_shape
    if types[0].dtype != torch.uint8 or width % 4:
        raise ValueError("codes of six bits are packed from uint8 of a width that four divides")
    return types[0].with_shape((*rows, width // 4 * 3))


def _compute_sextets(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    a, b, c, d = tensors[0].unflatten(-1, (-1, 4)).unbind(-1)
    return torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], -1).flatten(-2)


def _infer_pack(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    *rows, width = types[0].static_shape
    if types[0].dtype != torch.uint8 or width % 2:
        raise ValueError("codes are packed from uint8 of an even width")
    return types[0].with_shape((*rows, width // 2))


def _compute_pack(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    low, high = tensors[0].unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


OPS = (
    WeightOp("pack_nibbles", _infer_pack, _compute_pack, take_rows),
    WeightOp("pack_sextets", _infer_sextets, _compute_sextets, take_rows),
)
