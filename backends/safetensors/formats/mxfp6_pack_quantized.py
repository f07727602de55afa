"""compressed-tensors ``mxfp6-pack-quantized``: four e2m3 floats in three bytes, an exponent for every 32.

``weight_packed`` uint8 [out, 3 in / 4], little-endian, and ``weight_scale`` uint8 [out, in / 32].
"""

from __future__ import annotations

from backends.safetensors.formats.scheme import Format, Scheme
from compiler.weights.expr import Expr
from compiler.weights.ops.minifloat import pack_sextets


def _holds(scheme: Scheme) -> bool:
    return scheme.kind == "mx" and scheme.bits == 6


def _parts(value: Expr) -> dict[str, Expr]:
    codes, exponents = value.args
    return {"weight_packed": pack_sextets(codes), "weight_scale": exponents}


FORMAT = Format("mxfp6-pack-quantized", _holds, _parts)
