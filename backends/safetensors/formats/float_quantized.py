"""compressed-tensors ``float-quantized``: one e4m3 float an element.

``weight`` float8 [out, in] and ``weight_scale``: [1] for a matrix, [out, 1] for rows, [blocks of out, blocks of in].
"""

from __future__ import annotations

from backends.safetensors.formats.scheme import Format, Scheme
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import reshape


def _holds(scheme: Scheme) -> bool:
    return scheme.kind == "fp8"


def _parts(value: Expr) -> dict[str, Expr]:
    codes, scale = value.args
    return {"weight": codes, "weight_scale": scale if value.attr("rows") else reshape(scale, (1,))}


FORMAT = Format("float-quantized", _holds, _parts)
