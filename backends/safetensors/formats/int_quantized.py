"""compressed-tensors ``int-quantized``: one int8 an element.

``weight`` int8 [out, in], ``weight_scale`` [out, groups], and ``weight_zero_point`` int8 [out, groups].
"""

from __future__ import annotations

from backends.safetensors.formats.scheme import Format, Scheme
from compiler.weights.expr import Expr


def _holds(scheme: Scheme) -> bool:
    return scheme.kind == "int" and scheme.bits == 8


def _parts(value: Expr) -> dict[str, Expr]:
    names = ("weight", "weight_scale", "weight_zero_point")
    return dict(zip(names, value.args, strict=False))


FORMAT = Format("int-quantized", _holds, _parts)
