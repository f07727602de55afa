"""Codebooks: every group of inputs has a table of values of its own, and codes say which.

A weight w [..., out, in] is cut into groups of ``group`` inputs (0: the whole row), each with a table of 2^bits values.
The numbers of a k-means table are free. Of a ``linear`` one, for products bit by bit, a code's value is an offset and
one number more for each bit of it that is set: bits + 1 numbers, of which even steps are a special case.

``dequantize_codebook(codes int8 [..., out, in], table [..., out, groups * numbers])``; codes lie in
[-2^(bits-1), 2^(bits-1) - 1], as those of integers do, and are packed like them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp, take_rows
from compiler.weights.ops.codec import Alone, Parameters, row_chunks
from compiler.weights.ops.tables import linear_tables, means_tables

FEW = 4
"""Values at a time for which looking at every entry is quicker than a search among them."""


@dataclass(frozen=True)
class Codebook(Alone):
    """Codes int8 of ``bits`` bits; the parameters of a group are the numbers of its table, in ``dtype``."""

    bits: int
    group: int
    dtype: torch.dtype
    linear: bool = False

    @property
    def numbers(self) -> int:
        """How many numbers make the table of a group."""
        return self.bits + 1 if self.linear else 1 << self.bits

    @property
    def layout(self) -> dict[str, Any]:
        """The attributes that say what codes mean."""
        return {"bits": self.bits, "group": self.group, "linear": self.linear}

    def nearest(self, weight: Expr) -> Expr:
        table = apply("codebook_table", [weight], {**self.layout, "dtype": self.dtype})
        return self.expression([apply("codebook_codes", [weight, table], self.layout), table])

    def fit(self, values: Tensor, weights: Tensor | None = None) -> Parameters:
        flat = values.reshape(-1, values.shape[-1]).float()
        spread = None if weights is None else weights.expand(values.shape).reshape(flat.shape)
        make = linear_tables if self.linear else means_tables
        table = make(flat, spread, self.bits, self.dtype)
        return tuple(table.reshape(*values.shape[:-1], self.numbers).unbind(-1))

    def encode(self, values: Tensor, parameters: Parameters) -> Tensor:
        entries = self.entries(torch.stack(parameters, -1))
        values = values.float()
        if values.shape[-1] <= FEW:
            found = (values.unsqueeze(-1) - entries.unsqueeze(-2)).abs().argmin(-1)
        else:
            ordered, place = entries.sort(-1)
            between = (ordered[..., 1:] + ordered[..., :-1]) / 2
            found = place.gather(-1, torch.searchsorted(between, values.contiguous()))
        return (found - (1 << self.bits - 1)).to(torch.int8)

    def decode(self, codes: Tensor, parameters: Parameters) -> Tensor:
        return self.entries(torch.stack(parameters, -1)).gather(-1, codes.long() + (1 << self.bits - 1))

    def entries(self, table: Tensor) -> Tensor:
        """float32 [..., 2^bits]: the values of codes, least code first, by a table [..., numbers]."""
        table = table.float()
        values = table[..., :1] + table[..., 1:] @ _bits(self.bits) if self.linear else table
        return values.to(self.dtype).float()

    def features(self, codes: Tensor) -> Tensor:
        """float32 [..., numbers]: by what each number of the table is multiplied in the value of a code."""
        places = codes.long() + (1 << self.bits - 1)
        if not self.linear:
            return torch.nn.functional.one_hot(places, self.numbers).float()
        return torch.nn.functional.pad(_bits(self.bits).mT, (1, 0), value=1.0)[places]

    def rescaled(self, parameters: Parameters, factors: Tensor) -> Parameters:
        return tuple((part.float() * factors).to(self.dtype) for part in parameters)

    def stored(self, codes: Tensor, parameters: Parameters) -> tuple[Tensor, ...]:
        return codes, torch.stack(parameters, -1).flatten(-2)

    def expression(self, parts: Sequence[Expr]) -> Expr:
        return apply("dequantize_codebook", parts, self.layout)

    def parameters(self, table: Tensor) -> Parameters:
        """Parameters [..., groups] of a stored table."""
        return tuple(table.unflatten(-1, (-1, self.numbers)).unbind(-1))


def _bits(bits: int) -> Tensor:
    """float32 [bits, 2^bits]: whether each bit of each code is set, the lowest first."""
    return (torch.arange(1 << bits) >> torch.arange(bits)[:, None] & 1).float()


def _grouped(weight: Tensor, group: int) -> Tensor:
    return weight.unflatten(-1, (-1, group or weight.shape[-1]))


def _table_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    *rows, width = types[0].static_shape
    group = attrs["group"] or width
    if width % group:
        raise ValueError(f"groups of {group} do not divide {width} inputs")
    codec = _codec(attrs, attrs["dtype"])
    return TensorType(attrs["dtype"], (*rows, width // group * codec.numbers))


def _codes_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    if _table_type(types, {**attrs, "dtype": types[1].dtype}) != types[1]:
        raise ValueError(f"a table {types[1]} does not go with {types[0]}")
    return types[0].with_dtype(torch.int8)


def _value_type(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    if types[0].dtype != torch.int8 or not types[1].dtype.is_floating_point:
        raise ValueError("a codebook has codes int8 and a table of floats")
    return _codes_type(types, attrs).with_dtype(types[1].dtype)


def _codec(attrs: Attrs, dtype: torch.dtype) -> Codebook:
    return Codebook(attrs["bits"], attrs["group"], dtype, attrs["linear"])


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _compute_table(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    codec, (weight,) = _codec(attrs, attrs["dtype"]), tensors
    parts = [codec.fit(_grouped(rows, codec.group)) for (rows,) in row_chunks([_rows(weight)])]
    table = torch.cat([torch.stack(part, -1).flatten(-2) for part in parts])
    return table.reshape(*weight.shape[:-1], -1)


def _compute_codes(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    weight, table = tensors
    codec = _codec(attrs, table.dtype)
    chunks = row_chunks([_rows(weight), _rows(table)])
    parts = [codec.encode(_grouped(rows, codec.group), codec.parameters(own)).flatten(-2) for rows, own in chunks]
    return torch.cat(parts).reshape(weight.shape)


def _compute_values(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    codes, table = tensors
    codec = _codec(attrs, table.dtype)
    chunks = row_chunks([_rows(codes), _rows(table)])
    parts = [codec.decode(_grouped(rows, codec.group), codec.parameters(own)).flatten(-2) for rows, own in chunks]
    return torch.cat(parts).to(table.dtype).reshape(codes.shape)


OPS = (
    WeightOp("codebook_table", _table_type, _compute_table, take_rows),
    WeightOp("codebook_codes", _codes_type, _compute_codes, take_rows),
    WeightOp("dequantize_codebook", _value_type, _compute_values, take_rows),
)
