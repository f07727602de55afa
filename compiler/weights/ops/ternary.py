"""Codes -1, 0 and 1 that share a scale, stored as symmetric integers of two bits, so that readers of those read them.

The scale of a group and its codes are those of least squared error, exactly: for any scale s the elements of more than
s / 2 are not zero, so that these are the k largest of some k, and s is their mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp, take_rows
from compiler.weights.ops.codec import Parameters, row_chunks
from compiler.weights.ops.integer import Integer
from compiler.weights.ops.quant import group_count

BITS = 2


@dataclass(frozen=True)
class Ternary(Integer):
    """``Integer`` of two bits without its least code; the only parameter of a group is its scale."""

    def nearest(self, weight: Expr) -> Expr:
        scale = apply("ternary_scale", [weight], {"group": self.group, "dtype": self.dtype})
        return self.expression([apply("ternary_codes", [weight, scale]), scale])

    def fit(self, values: Tensor, weights: Tensor | None = None) -> Parameters:
        ordered, places = values.abs().float().sort(-1, descending=True)
        counted = torch.ones_like(ordered) if weights is None else weights.expand(values.shape).gather(-1, places)
        totals, counts = (ordered * counted).cumsum(-1), counted.cumsum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        best = (totals.square() / counts).argmax(-1, keepdim=True)
        scale = (totals.gather(-1, best) / counts.gather(-1, best)).squeeze(-1)
        stored = scale.to(self.dtype).clamp(min=torch.finfo(self.dtype).tiny)
        return (stored.where(scale > 0, torch.ones((), dtype=self.dtype)),)

    def encode(self, values: Tensor, parameters: Parameters) -> Tensor:
        return (values / parameters[0].float().unsqueeze(-1)).round().clamp(-1, 1).to(torch.int8)


def _infer_scale(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    if not attrs["dtype"].is_floating_point:
        raise ValueError("scales are floating-point")
    *rows, width = types[0].static_shape
    return TensorType(attrs["dtype"], (*rows, group_count(width, attrs["group"])))


def _compute_scale(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    (weight,) = tensors
    groups, codec = group_count(weight.shape[-1], attrs["group"]), Ternary(BITS, attrs["group"], attrs["dtype"])
    rows = weight.reshape(-1, weight.shape[-1])
    parts = [codec.fit(part.float().unflatten(-1, (groups, -1)))[0] for (part,) in row_chunks([rows])]
    return torch.cat(parts).reshape(*weight.shape[:-1], groups)


def _infer_codes(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    weight, scale = types
    if weight.static_shape[:-1] != scale.static_shape[:-1] or weight.static_shape[-1] % scale.static_shape[-1]:
        raise ValueError(f"scales {scale} do not go with {weight}")
    return weight.with_dtype(torch.int8)


def _compute_codes(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    weight, scale = (tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors)
    codec = Ternary(BITS, weight.shape[1] // scale.shape[1], scale.dtype)
    parts = [
        codec.encode(rows.float().unflatten(-1, (scale.shape[1], -1)), (own,))
        for rows, own in row_chunks([weight, scale])
    ]
    return torch.cat(parts).reshape(tensors[0].shape)


OPS = (
    WeightOp("ternary_scale", _infer_scale, _compute_scale, take_rows),
    WeightOp("ternary_codes", _infer_codes, _compute_codes, take_rows),
)
