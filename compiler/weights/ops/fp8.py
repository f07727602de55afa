"""FP8 weights: e4m3 codes times a scale a row, a block or the whole matrix.

w ~ q * s. ``dequantize_fp8(codes f8e4m3 [..., out, in], scale [..., blocks of out, blocks of in])``; scales have the
dtype of the value. The last blocks of rows and of inputs may be smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compiler.weights.ops.blockfloat import BlockFloat, ops_of
from compiler.weights.ops.codec import Parameters, least
from compiler.weights.ops.minifloat import E4M3, E4M3_MAX, Element, exponent_above, power_of_two

STRETCHES = (1.0, 2**0.25, 2**0.5, 2**0.75)  # of the least scale: e4m3 looks alike an octave up
REPEATED = E4M3_MAX / 256  # makes the largest magnitude 256 steps: it, and a group that repeats it, is exact


@dataclass(frozen=True)
class Fp8(BlockFloat):
    """A scale for every ``rows`` rows of ``group`` inputs, rounded to ``dtype``."""

    name: ClassVar[str] = "fp8"

    @property
    def element(self) -> Element:
        return E4M3

    @property
    def scale_dtype(self) -> torch.dtype:
        return self.dtype

    def multiplier(self, scale: Tensor) -> Tensor:
        return scale.float()

    def scale_of(self, multiplier: Tensor) -> Tensor:
        return multiplier.to(self.dtype).clamp(min=torch.finfo(self.dtype).tiny)

    def fit(self, values: Tensor, weights: Tensor | None = None) -> Parameters:
        amplitude = self._shared(values.abs().amax(-1).float(), "amax")
        factors = (*STRETCHES, REPEATED) if self.search else STRETCHES[:1]
        scales = [self._scale(amplitude, factor) for factor in factors]
        scales += [self._power_of_two(amplitude)] if self.search else []
        return (least((scale, self._shared(self.error(values, scale, weights), "sum")) for scale in scales),)

    def _scale(self, amplitude: Tensor, factor: float) -> Tensor:
        scale = self.scale_of(amplitude * (factor / E4M3_MAX))
        return scale.where(amplitude > 0, torch.ones_like(scale))

    def _power_of_two(self, amplitude: Tensor) -> Tensor:
        """The least power of two that clips nothing: numbers that are e4m3 times a power of two are exact."""
        return self._scale(power_of_two(exponent_above(amplitude / E4M3_MAX)), E4M3_MAX)

    def _shared(self, per_row: Tensor, how: Literal["amax", "sum"]) -> Tensor:
        """[rows, ...] with the largest, or the sum, of every block's rows in each of them."""
        if self.rows == 1:
            return per_row
        count = len(per_row)
        size = self.rows or count
        blocks = [getattr(block, how)(0, keepdim=True).expand_as(block) for block in per_row.split(size)]
        return torch.cat(blocks)


OPS = ops_of(Fp8)
