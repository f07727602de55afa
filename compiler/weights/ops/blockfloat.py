"""What number systems of floats that share a scale have in common, and the weight operations each of them has.

A system NAME has ``NAME_scale(weight, *shared)``, ``NAME_codes(weight, scale, *shared)`` and
``dequantize_NAME(codes, scale, *shared)``, whose attributes are the fields of its class. ``shared`` is what a whole
matrix has in common, if anything.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, Take, WeightOp, take_elementwise, take_rows
from compiler.weights.ops.codec import Alone, Parameters, row_chunks, weighted_squares
from compiler.weights.ops.minifloat import Element


@dataclass(frozen=True)
class BlockFloat(Alone, ABC):
    """Codes of an element type times the multiplier of their block, rounded to ``dtype``: a ``Codec``.

    A block is ``rows`` (0: all) rows of ``group`` (0: all) inputs; its only parameter is its scale as it is stored.
    ``search`` tells ``fit`` to try more scales than the least that clips nothing.
    """

    dtype: torch.dtype
    rows: int = 1
    group: int = 0
    search: bool = True

    name: ClassVar[str]

    @property
    @abstractmethod
    def element(self) -> Element: ...

    @property
    @abstractmethod
    def scale_dtype(self) -> torch.dtype: ...

    @abstractmethod
    def fit(self, values: Tensor, weights: Tensor | None = None) -> Parameters: ...

    @abstractmethod
    def multiplier(self, scale: Tensor) -> Tensor:
        """float32: what codes are multiplied by where the stored scale is ``scale``."""

    @property
    def bits(self) -> int:
        return self.element.bits

    @property
    def by_rows(self) -> bool:
        return self.rows == 1

    def sharing(self, shared: Sequence[Tensor]) -> Self:
        """The codec with what a matrix shares, as tensors."""
        return self

    def encode(self, values: Tensor, parameters: Parameters) -> Tensor:
        return self.element.encode(values.float() / self.multiplier(parameters[0]).unsqueeze(-1))

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        product = self.element.decode(codes) * self.multiplier(parameters[0]).unsqueeze(-1)
        return self.rounded(product).float()

    def rounded(self, product: Tensor) -> Tensor:
        """Exact values in the dtype that loaders compute them in."""
        return product.to(self.dtype)

    def rescaled(self, parameters: Parameters, factors: Tensor) -> Parameters:
        return (self.scale_of(self.multiplier(parameters[0]) * factors),) if self.rows == 1 else parameters

    @abstractmethod
    def scale_of(self, multiplier: Tensor) -> Tensor:
        """The stored scale nearest to a ``multiplier`` > 0, by difference."""

    def stored(self, codes: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
        return codes, parameters[0][:: self.rows or codes.shape[0]].contiguous()

    def expression(self, parts: Sequence[Expr]) -> Expr:
        return apply(f"dequantize_{self.name}", parts, self.layout)

    def shared_by(self, weight: Expr) -> tuple[Expr, ...]:
        """What each matrix of ``weight`` shares, as ``sharing`` takes it."""
        return ()

    def nearest(self, weight: Expr) -> Expr:
        shared = self.shared_by(weight)
        scale = apply(f"{self.name}_scale", [weight, *shared], {**self.layout, "search": self.search})
        codes = apply(f"{self.name}_codes", [weight, scale, *shared], self.layout)
        return self.expression([codes, scale, *shared])

    @property
    def layout(self) -> dict[str, Any]:
        """The attributes that say what codes mean."""
        return {"dtype": self.dtype, "rows": self.rows, "group": self.group}

    def error(self, values: Tensor, scale: Tensor, weights: Tensor | None) -> Tensor:
        """The squared error of every group of ``values`` under stored scales, weighted."""
        given = (values, scale) if weights is None else (values, scale, weights.expand(values.shape))
        return torch.cat([self._error(*part) for part in row_chunks(given)])

    def _error(self, values: Tensor, scale: Tensor, weights: Tensor | None = None) -> Tensor:
        factor = self.multiplier(scale).unsqueeze(-1)
        product = self.element.round(values.float() / factor).mul_(factor)
        return weighted_squares(self.rounded(product).float().sub_(values), weights)


def _blocks(size: int, block: int) -> int:
    return math.ceil(size / block) if block else 1


def grouped(matrix: Tensor, group: int) -> Tensor:
    """[rows, in] as [rows, groups, group]; a last, shorter group is filled up with zeros."""
    group = group or matrix.shape[-1]
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[-1] % group)).unflatten(-1, (-1, group))


def ops_of(system: type[BlockFloat]) -> tuple[WeightOp, ...]:
    """The weight operations of a number system."""
    name = system.name

    def scale_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
        codec, (*lead, rows, width) = system(**attrs), types[0].static_shape
        if not codec.dtype.is_floating_point or not types[0].dtype.is_floating_point:
            raise ValueError("weights and their values are floating-point")
        if codec.rows == 1 and codec.group and width % codec.group:
            raise ValueError(f"groups of {codec.group} do not divide {width} inputs")
        shape = (*lead, _blocks(rows, codec.rows), _blocks(width, codec.group))
        return TensorType(codec.scale_dtype, shape)

    def codes_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
        if scale_type(types, attrs) != types[1]:
            raise ValueError(f"scales {types[1]} do not go with {types[0]}")
        return types[0].with_dtype(system(**attrs).element.dtype)

    def value_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
        codec, weight = system(**attrs), types[0].with_dtype(torch.float32)
        if types[0].dtype != codec.element.dtype or scale_type([weight], attrs) != types[1]:
            raise ValueError(f"scales {types[1]} do not go with codes {types[0]}")
        return types[0].with_dtype(codec.dtype)

    def scales(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
        return _by_matrix(system(**attrs), tensors, _scales_of, 1)

    def codes(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
        return _by_matrix(system(**attrs), tensors, _codes_of, 2)

    def values(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
        return _by_matrix(system(**attrs), tensors, _values_of, 2)

    take = _take_of(system)
    return (
        WeightOp(f"{name}_scale", scale_type, scales, take),
        WeightOp(f"{name}_codes", codes_type, codes, take),
        WeightOp(f"dequantize_{name}", value_type, values, take),
    )


def _by_matrix(codec: BlockFloat, tensors: Sequence[Tensor], made: Callable[..., Tensor], own: int) -> Tensor:
    """``made(codec, ...)`` of every matrix of ``tensors``; those behind the first ``own`` are what it shares."""
    flat = [tensor.reshape(-1, *tensor.shape[-2:]) for tensor in tensors]
    found = [made(codec.sharing(parts[own:]), *parts[:own]) for parts in zip(*flat, strict=True)]
    return torch.stack(found).reshape(*tensors[0].shape[:-2], *found[0].shape)


def _scales_of(codec: BlockFloat, weight: Tensor) -> Tensor:
    chunks = row_chunks([weight]) if codec.rows == 1 else [(weight,)]
    scale = torch.cat([codec.fit(grouped(rows, codec.group))[0] for (rows,) in chunks])
    return scale[:: codec.rows or len(scale)]


def _codes_of(codec: BlockFloat, weight: Tensor, scale: Tensor) -> Tensor:
    chunks = row_chunks([weight, _of_rows(codec, scale, len(weight))])
    parts = [codec.encode(grouped(rows, codec.group), (scales,)) for rows, scales in chunks]
    return torch.cat(parts).flatten(-2)[:, : weight.shape[1]]


def _values_of(codec: BlockFloat, codes: Tensor, scale: Tensor) -> Tensor:
    chunks = row_chunks([codes, _of_rows(codec, scale, len(codes))])
    parts = [codec.decode(grouped(rows, codec.group), (scales,)).to(codec.dtype) for rows, scales in chunks]
    return torch.cat(parts).flatten(-2)[:, : codes.shape[1]]


def _of_rows(codec: BlockFloat, scale: Tensor, rows: int) -> Tensor:
    """Stored scales [blocks, groups] for each of ``rows`` rows."""
    return scale if codec.rows == 1 else scale[torch.arange(rows) // (codec.rows or rows)]


def _take_of(system: type[BlockFloat]) -> Take:
    def take(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
        """Whole matrices of a stack, and rows of a matrix where rows share nothing."""
        attrs = dict(expr.attrs)
        if expr.type.rank == 3 and axis == 0:
            return take_elementwise(expr, axis, start, stop)
        return take_rows(expr, axis, start, stop) if expr.type.rank == 2 and system(**attrs).rows == 1 else None

    return take
