"""Integers with zero points that are any numbers: (q - z) * s, as half-quadratic quantisation (HQQ) has them.

``dequantize_real(codes, scale, zero)`` is ``dequantize`` with z in the dtype of the scales; values are computed in
float32 and rounded to that dtype once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp, take_rows
from compiler.weights.ops.basic import reshape, slice
from compiler.weights.ops.codec import Alone, Parameters, row_chunks, weighted_squares
from compiler.weights.ops.quant import away_from_zero, code_range, codes_of, infer_dequantized, scales_of, zeros_of

ROUNDS = 8  # in which codes and parameters are fitted in turns
SHRINK, GROWTH = 10.0, 1.01  # beta of the half-quadratic splitting, and by what it grows each round, as published


@dataclass(frozen=True)
class RealZeros(Alone):
    """Codes int8 q of ``bits`` bits with parameters (s, z), both of ``dtype``, of least errors to the ``power``.

    Of what integer zero points give, and of the range of each group as it is, each improved in turns with codes: by
    least squares, or, of other powers, zero points alone as HQQ does. So never worse than integer zero points.
    """

    bits: int
    group: int
    dtype: torch.dtype
    power: float = 2.0

    def nearest(self, weight: Expr) -> Expr:
        fitted = apply("real_zeros_fit", [weight], {"codec": (self.bits, self.group, self.power), "dtype": self.dtype})
        scale, zero = (reshape(slice(fitted, 0, i, i + 1), fitted.shape[1:]) for i in range(2))
        return self.expression([apply("quantize", [weight, scale, zero], {"bits": self.bits}), scale, zero])

    def fit(self, values: Tensor, weights: Tensor | None = None) -> Parameters:
        found = self._whole(values, weights)
        lost = self._lost(values, found, weights)
        for start in (found, self._range(values, found)):
            for other in (start, *self._improved(values, start, weights)):
                own = self._lost(values, other, weights)
                better = own < lost
                found = tuple(new.where(better, old) for new, old in zip(other, found, strict=True))
                lost = own.where(better, lost)
        return found

    def encode(self, values: Tensor, parameters: Parameters) -> Tensor:
        return codes_of(values, parameters[0].float(), parameters[1].float(), self.bits).to(torch.int8)

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return self._values(codes, parameters).to(self.dtype).float()

    def rescaled(self, parameters: Parameters, factors: Tensor) -> Parameters:
        return away_from_zero((parameters[0].float() * factors).to(self.dtype)), parameters[1]

    def stored(self, codes: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
        return codes, *parameters

    def expression(self, parts: Sequence[Expr]) -> Expr:
        return apply("dequantize_real", parts, {"bits": self.bits, "group": self.group})

    def _values(self, codes: Tensor, parameters: Parameters) -> Tensor:
        scale, zero = (part.float().unsqueeze(-1) for part in parameters)
        return (codes.float() - zero) * scale

    def _whole(self, values: Tensor, weights: Tensor | None) -> Parameters:
        zero = zeros_of(values, self.bits)
        scale = scales_of(values, zero, self.bits, self.dtype, search=True, weights=weights, power=self.power)
        return scale, zero.to(self.dtype)

    def _range(self, values: Tensor, other: Parameters) -> Parameters:
        """The scale and zero point at which the range of a group is that of codes; ``other`` of groups of one value."""
        low, high = values.amin(-1), values.amax(-1)
        scale = away_from_zero(((high - low) / ((1 << self.bits) - 1)).to(self.dtype))
        zero = code_range(self.bits)[0] - low / scale.float()
        usable = (high > low) & (zero.abs() < 1 << 2 * self.bits)
        return scale.where(usable, other[0]), zero.to(self.dtype).where(usable, other[1])

    def _improved(self, values: Tensor, found: Parameters, weights: Tensor | None) -> Iterator[Parameters]:
        beta = SHRINK
        for _ in range(ROUNDS):
            codes = self.encode(values, found).float()
            if self.power == 2.0:
                found = self._least_squares(values, codes, found, weights)
            else:
                found = found[0], self._half_quadratic(values, codes, found, beta)
                beta *= GROWTH
            yield found

    def _least_squares(self, values: Tensor, codes: Tensor, found: Parameters, weights: Tensor | None) -> Parameters:
        """s and z of least squared error for ``codes``; those before where all codes of a group are the same."""
        share = torch.ones_like(values) if weights is None else weights.expand(values.shape)
        share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        centre, level = ((share * part).sum(-1, keepdim=True) for part in (codes, values))
        spread = (share * (codes - centre).square()).sum(-1)
        slope = (share * (codes - centre) * (values - level)).sum(-1) / spread.clamp_min(1e-12)
        scale = away_from_zero(slope.to(self.dtype))
        zero = (centre - level / scale.float().unsqueeze(-1)).squeeze(-1)
        usable = (spread > 0) & (slope > 0) & (zero.abs() < 1 << 2 * self.bits)
        return scale.where(usable, found[0]), zero.to(self.dtype).where(usable, found[1])

    def _half_quadratic(self, values: Tensor, codes: Tensor, found: Parameters, beta: float) -> Tensor:
        """z for ``codes``, once the errors that may stay large are taken out of ``values``: one step of HQQ."""
        error = values - self._values(codes, found)
        size = error.abs()
        kept = (size - size.clamp_min(1e-8).pow(self.power - 1) / beta).clamp_min(0) * error.sign()
        return (codes - (values - kept) / found[0].float().unsqueeze(-1)).mean(-1).to(self.dtype)

    def _lost(self, values: Tensor, found: Parameters, weights: Tensor | None) -> Tensor:
        error = self.decode(self.encode(values, found), found) - values
        return weighted_squares(error if self.power == 2.0 else error.abs_().pow_(self.power / 2), weights)


def _infer_fit(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    *rows, width = types[0].static_shape
    group = attrs["codec"][1] or width
    if width % group:
        raise ValueError(f"groups of {group} do not divide {width} inputs")
    return TensorType(attrs["dtype"], (2, *rows, width // group))


def _compute_fit(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    (weight,), (bits, group, power) = tensors, attrs["codec"]
    codec, groups = RealZeros(bits, group, attrs["dtype"], power), weight.shape[-1] // (group or weight.shape[-1])
    rows = weight.reshape(-1, weight.shape[-1])
    parts = [torch.stack(codec.fit(own.float().unflatten(-1, (groups, -1)))) for (own,) in row_chunks([rows])]
    return torch.cat(parts, 1).reshape(2, *weight.shape[:-1], groups)


def _infer(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    if types[1] != types[2]:
        raise ValueError(f"zero points {types[2]} do not go with scales {types[1]}")
    return infer_dequantized(types, attrs)


def _compute(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    codes, scale, zero = tensors
    values = codes.unflatten(-1, (scale.shape[-1], -1)).float() - zero.float().unsqueeze(-1)
    return (values * scale.float().unsqueeze(-1)).flatten(-2).to(scale.dtype)


OPS = (
    WeightOp("real_zeros_fit", _infer_fit, _compute_fit),
    WeightOp("dequantize_real", _infer, _compute, take_rows),
)
