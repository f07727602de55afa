"""compressed-tensors ``nvfp4-pack-quantized``: two e2m1 floats a byte, an e4m3 scale for every 16.

``weight_packed`` uint8 [out, in / 2], the even element in the low half, ``weight_scale`` float8 [out, in / 16], and
``weight_global_scale`` float32 [1], which divides the others.
"""

from __future__ import annotations

from backends.safetensors.formats.scheme import Format, Scheme
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import reshape
from compiler.weights.ops.minifloat import pack_nibbles


def _holds(scheme: Scheme) -> bool:
    return scheme.kind == "nvfp4"


def _parts(value: Expr) -> dict[str, Expr]:
    codes, scale, divisor = value.args
    return {
        "weight_packed": pack_nibbles(codes),
        "weight_scale": scale,
        "weight_global_scale": reshape(divisor, (1,)),
    }


FORMAT = Format("nvfp4-pack-quantized", _holds, _parts)
