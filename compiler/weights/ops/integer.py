"""Integers of a few bits as a number system: (q - z) * s."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.weights.expr import Expr, apply
from compiler.weights.ops.codec import Alone, Parameters
from compiler.weights.ops.quant import away_from_zero, codes_of, quantise, scales_of, zeros_of


@dataclass(frozen=True)
class Integer(Alone):
    """Codes int8 q of ``bits`` bits with parameters (s,), or (s, z) unless ``symmetric``; see ``quant`` beside it.

    Scales and values are of ``dtype``; z is int8. ``search`` tells ``fit`` to try scales that clip, and to take that of
    the least sum of errors to the ``power``.
    """

    bits: int
    group: int
    dtype: torch.dtype
    symmetric: bool = True
    search: bool = True
    power: float = 2.0

    def nearest(self, weight: Expr) -> Expr:
        return quantise(
            weight,
            self.bits,
            self.group,
            symmetric=self.symmetric,
            search=self.search,
            power=self.power,
            scale_dtype=self.dtype,
        )

    def fit(self, values: Tensor, weights: Tensor | None = None) -> Parameters:
        zero = None if self.symmetric else zeros_of(values, self.bits)
        scale = scales_of(values, zero, self.bits, self.dtype, search=self.search, weights=weights, power=self.power)
        return (scale,) if zero is None else (scale, zero)

    def encode(self, values: Tensor, parameters: Parameters) -> Tensor:
        zero = None if self.symmetric else parameters[1]
        return codes_of(values, parameters[0].float(), zero, self.bits).to(torch.int8)

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        shifted = codes.float() if self.symmetric else codes.float() - parameters[1].unsqueeze(-1)
        return (shifted * parameters[0].float().unsqueeze(-1)).to(self.dtype).float()

    def rescaled(self, parameters: Parameters, factors: Tensor) -> Parameters:
        return away_from_zero((parameters[0].float() * factors).to(self.dtype)), *parameters[1:]

    def stored(self, codes: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
        return codes, *parameters

    def expression(self, parts: Sequence[Expr]) -> Expr:
        return apply("dequantize", parts, {"bits": self.bits, "group": self.group})
