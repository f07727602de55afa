"""compressed-tensors ``pack-quantized``: codes packed densely into int32 words.

``weight_packed`` int32 [out, ceil(in * bits / 32)], ``weight_scale`` [out, groups], ``weight_shape`` int64 [2], and
``weight_zero_point`` int32 [ceil(out * bits / 32), groups], packed along the rows.
"""

from __future__ import annotations

import torch

from backends.safetensors.formats.scheme import Format, Scheme
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import literal
from compiler.weights.ops.quant import pack_bits


def _holds(scheme: Scheme) -> bool:
    return scheme.kind == "int" and 2 <= scheme.bits <= 8


def packed_parts(value: Expr) -> dict[str, Expr]:
    """The parts of a quantised weight [..., out, in] but its shape, by name."""
    bits = value.attr("bits")
    codes, scale, *zero = value.args
    parts = {"weight_packed": pack_bits(codes, bits), "weight_scale": scale}
    return {**parts, "weight_zero_point": pack_bits(zero[0], bits, axis=-2)} if zero else parts


def _parts(value: Expr) -> dict[str, Expr]:
    shape = literal([float(size) for size in value.shape], dtype=torch.int64)
    return {**packed_parts(value), "weight_shape": shape}


FORMAT = Format("pack-quantized", _holds, _parts)
