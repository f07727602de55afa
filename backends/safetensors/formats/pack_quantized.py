"""compressed-tensors ``pack-quantized``: codes packed densely into int32 words.

``weight_packed`` int32 [out, ceil(in * bits / 32)], ``weight_scale`` [out, groups], ``weight_shape`` int64 [2], and
``weight_zero_point`` int32 [ceil(out * bits / 32), groups], packed along the rows.
"""

from __future__ import annotations

import torch

from backends.safetensors.formats.scheme import Format, Scheme
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import literal
from compiler.weights.ops.quant import packed_parts


def _holds(scheme: Scheme) -> bool:
    return scheme.kind == "int" and 2 <= scheme.bits <= 8


def _parts(value: Expr) -> dict[str, Expr]:
    shape = literal([float(size) for size in value.shape], dtype=torch.int64)
    named = zip(("weight_packed", "weight_scale", "weight_zero_point"), packed_parts(value), strict=False)
    return {**dict(named), "weight_shape": shape}


FORMAT = Format("pack-quantized", _holds, _parts)
