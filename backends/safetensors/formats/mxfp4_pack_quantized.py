"""compressed-tensors ``mxfp4-pack-quantized``: two e2m1 floats a byte, an exponent for every 32.

``weight_packed`` uint8 [out, in / 2], the even element in the low half, and ``weight_scale`` uint8 [out, in / 32].
"""

from __future__ import annotations

from backends.safetensors.formats.scheme import Format, Scheme
from compiler.weights.expr import Expr
from compiler.weights.ops.minifloat import pack_nibbles


def _holds(scheme: Scheme) -> bool:
    return scheme.kind == "mx" and scheme.bits == 4


def _parts(value: Expr) -> dict[str, Expr]:
    codes, exponents = value.args
    return {"weight_packed": pack_nibbles(codes), "weight_scale": exponents}


FORMAT = Format("mxfp4-pack-quantized", _holds, _parts)
