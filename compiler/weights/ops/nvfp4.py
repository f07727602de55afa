"""NVFP4: blocks of 16 inputs whose e2m1 floats share an e4m3 scale, and a float32 number a matrix that divides those.

w ~ q * s / g. ``dequantize_nvfp4(codes u8 [..., out, in], scale f8e4m3 [..., out, in / 16], g f32 [..., 1, 1])``. g is
a power of two here, so that s / g is exact. The loader computes in bfloat16, and so do values, whatever their dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp
from compiler.weights.ops.blockfloat import BlockFloat, ops_of
from compiler.weights.ops.codec import Parameters, least
from compiler.weights.ops.minifloat import E2M1, E4M3_MAX, Element, e4m3_codes, exponent_above, power_of_two

STEPS = (0, 1, 2, 3, 4, 5, -1, -2, -3, -4)  # of e4m3 scales, eight an octave, from the least that clips nothing
LEAST_SCALE = 2.0**-9
ROOM = 4.0  # the code that the largest magnitude may become without its scale exceeding e4m3


@dataclass(frozen=True)
class Nvfp4(BlockFloat):
    """Blocks of 16; the only parameter of one is its e4m3 scale.

    ``divisor`` is g, [1, 1], of ``for_matrix``. ``shared`` is the g of a matrix [out, in] and others: runtimes that
    join matrices of one input want one g.
    """

    group: int = 16
    divisor: Tensor | None = None
    shared: Expr | None = None

    name: ClassVar[str] = "nvfp4"

    @property
    def element(self) -> Element:
        return E2M1

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    @property
    def by_rows(self) -> bool:
        return False

    def for_matrix(self, matrix: Tensor, energy: Tensor | None = None) -> Self:
        return self if self.divisor is not None else replace(self, divisor=divisor_of([matrix]))

    def reading(self, value: Callable[[Expr], Tensor]) -> Self:
        return self if self.shared is None else replace(self, divisor=value(self.shared))

    def shared_by(self, weight: Expr) -> tuple[Expr, ...]:
        return (divisor([weight]) if self.shared is None else self.shared,)

    def sharing(self, shared: Sequence[Tensor]) -> Self:
        return replace(self, divisor=shared[0]) if shared else self

    def multiplier(self, scale: Tensor) -> Tensor:
        return scale.float() / self._divisor

    def scale_of(self, multiplier: Tensor) -> Tensor:
        return e4m3_codes((multiplier * self._divisor).clamp(min=LEAST_SCALE))

    def rounded(self, product: Tensor) -> Tensor:
        return product.to(torch.bfloat16).to(self.dtype)

    def fit(self, values: Tensor, weights: Tensor | None = None) -> Parameters:
        amplitude = values.abs().amax(-1).float()
        wanted = amplitude * self._divisor / self.element.largest
        nearest = e4m3_codes(wanted)
        place = nearest.view(torch.uint8).int() + (nearest.float() < wanted)  # codes of positive floats are in order
        scales = [self._scale(place + step, amplitude) for step in (STEPS if self.search else STEPS[:1])]
        return (least((scale, self.error(values, scale, weights)) for scale in scales),)

    def stored(self, codes: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
        return *super().stored(codes, parameters), self._divisor.reshape(1, 1)

    @property
    def _divisor(self) -> Tensor:
        assert self.divisor is not None, "for_matrix comes first"
        return self.divisor.flatten()

    def _scale(self, place: Tensor, amplitude: Tensor) -> Tensor:
        largest = int(e4m3_codes(torch.tensor(E4M3_MAX)).view(torch.uint8))
        one = int(e4m3_codes(torch.tensor(1.0)).view(torch.uint8))
        return place.clamp(1, largest).where(amplitude > 0, one).to(torch.uint8).view(torch.float8_e4m3fn)


def divisor(weights: Sequence[Expr]) -> Expr:
    """The g, [..., 1, 1], that weights [..., out, in] share."""
    return apply("nvfp4_divisor", sorted(weights, key=lambda weight: weight.key))


def divisor_of(matrices: Sequence[Tensor]) -> Tensor:
    """g of matrices, float32 [1, 1]: the largest power of two at which their largest scale has room."""
    amplitude = torch.stack([matrix.abs().amax().float() for matrix in matrices]).amax()
    return power_of_two(-exponent_above(amplitude / (E4M3_MAX * ROOM))).where(amplitude > 0, 1.0).reshape(1, 1)


def _infer_divisor(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    if len({type.static_shape[:-2] for type in types}) > 1:
        raise ValueError("the leading axes differ")
    return TensorType(torch.float32, (*types[0].static_shape[:-2], 1, 1))


def _compute_divisor(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    flat = [tensor.reshape(-1, *tensor.shape[-2:]) for tensor in tensors]
    found = torch.stack([divisor_of(matrices) for matrices in zip(*flat, strict=True)])
    return found.reshape(*tensors[0].shape[:-2], 1, 1)


OPS = (WeightOp("nvfp4_divisor", _infer_divisor, _compute_divisor), *ops_of(Nvfp4))
