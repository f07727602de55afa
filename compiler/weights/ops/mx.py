"""Microscaling: blocks of 32 inputs whose floats of four (e2m1), six (e2m3, e3m2) or eight (e4m3) bits share a power of
two.

w ~ q * 2^(e - 127). ``dequantize_mx(codes, exponents u8 [..., out, in / 32])`` with codes uint8, one each, for those of
four and six bits and float8 for e4m3. Open Compute Project, Microscaling Formats 1.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from compiler.weights.ops.blockfloat import BlockFloat, ops_of
from compiler.weights.ops.codec import Parameters, least
from compiler.weights.ops.minifloat import E2M1, E2M3, E3M2, E4M3, Element, exponent_above, power_of_two

BIAS = 127
ELEMENTS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3": E4M3}
OFFSETS = (0, 1, -1)  # of exponents from the least that clips nothing


@dataclass(frozen=True)
class Mx(BlockFloat):
    """Blocks of 32 elements ``of`` a kind; the only parameter is the biased exponent."""

    group: int = 32
    of: Literal["e2m1", "e2m3", "e3m2", "e4m3"] = "e2m1"

    name: ClassVar[str] = "mx"

    @property
    def element(self) -> Element:
        return ELEMENTS[self.of]

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def layout(self) -> dict[str, Any]:
        return {**super().layout, "of": self.of}

    def multiplier(self, scale: Tensor) -> Tensor:
        return power_of_two(scale.int() - BIAS)

    def scale_of(self, multiplier: Tensor) -> Tensor:
        return (exponent_above(multiplier / 1.5) + BIAS).clamp(0, 2 * BIAS).to(torch.uint8)

    def fit(self, values: Tensor, weights: Tensor | None = None) -> Parameters:
        amplitude = values.abs().amax(-1).float()
        exponent = exponent_above(amplitude / self.element.largest) + BIAS
        scales = [self._exponent(exponent + offset, amplitude) for offset in (OFFSETS if self.search else (0,))]
        return (least((scale, self.error(values, scale, weights)) for scale in scales),)

    def _exponent(self, biased: Tensor, amplitude: Tensor) -> Tensor:
        return biased.clamp(0, 2 * BIAS).where(amplitude > 0, BIAS).to(torch.uint8)


OPS = ops_of(Mx)
