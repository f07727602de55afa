"""compressed-tensors ``mxfp8-quantized``: one e4m3 float an element, an exponent for every 32.

``weight`` float8 [out, in] and ``weight_scale`` uint8 [out, in / 32].
"""

from __future__ import annotations

from backends.safetensors.formats.scheme import Format, Scheme
from compiler.weights.expr import Expr


def _holds(scheme: Scheme) -> bool:
    return scheme.kind == "mx" and scheme.bits == 8


def _parts(value: Expr) -> dict[str, Expr]:
    return dict(zip(("weight", "weight_scale"), value.args, strict=True))


FORMAT = Format("mxfp8-quantized", _holds, _parts)
