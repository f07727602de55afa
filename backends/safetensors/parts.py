"""Which tensors of a file stand for a weight: itself when it is dense, its parts when it is quantised."""

from __future__ import annotations

import re

from backends.safetensors.formats import format_of, scheme_of
from compiler.ir.graph import Param
from compiler.weights.expr import Expr
from compiler.weights.ops import take
from compiler.weights.ops.basic import cast, reshape
from compiler.weights.ops.codec import is_quantised
from compiler.weights.ops.expert_widths import by_width
from compiler.weights.ops.minifloat import pack_sextets
from compiler.weights.ops.quant import packed_parts
from compiler.weights.rows import as_dequantize

EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")


def stored_parts(key: str, expr: Expr) -> dict[str, Expr]:
    """The tensors of the file that stand for ``expr`` under ``key``: itself when it is dense, otherwise its parts."""
    value = as_dequantize(expr)
    if value is None:
        return {key: expr}
    if value.op == "dequantize_gguf":
        return {key: value.args[0]}
    if value.op == "dequantize_codebook":
        stem = key.removesuffix("weight")
        return dict(zip((f"{stem}weight_packed", f"{stem}weight_table"), packed_parts(value), strict=True))
    if value.op == "dequantize_real":
        stem = key.removesuffix("weight")
        return dict(
            zip((f"{stem}weight_packed", f"{stem}weight_scale", f"{stem}weight_zero"), packed_parts(value), strict=True)
        )
    if value.op == "dequantize_stack":
        return {f"{key}_block_{index}": block for index, block in enumerate(value.args)}
    if value.op == "dequantize_mx" and value.attr("of") == "e3m2":
        stem = key.removesuffix("weight")
        return {f"{stem}weight_packed": pack_sextets(value.args[0]), f"{stem}weight_scale": value.args[1]}
    storage = format_of(scheme_of(value), expert=bool(EXPERT.search(key)))
    return {key.removesuffix("weight") + suffix: part for suffix, part in storage.parts(value).items()}


def stored_tensors(param: Param) -> list[Expr]:
    """The tensors of a file that stand for ``param``, without their names: what they take is known from this alone.

    Checkpoints hold quantised experts one by one, and the two halves of a gated one apart.
    """
    if not is_quantised(param.expr):
        return [cast(param.expr, param.storage)]
    if param.expr.op == "dequantize_experts":
        return [part for stack in by_width(param.expr).values() for part in packed_parts(stack)]
    matrices = [param.expr] if param.type.rank == 2 else _expert_matrices(param)
    key = "weight" if param.type.rank == 2 else "experts.0.weight"
    return [part for matrix in matrices for part in stored_parts(key, matrix).values()]


def _expert_matrices(param: Param) -> list[Expr]:
    gated = any(node.op.name == "experts" and node.inputs[3] is param for node in param.users)
    count, rows, width = param.expr.shape
    halves = 2 if gated else 1
    split = reshape(param.expr, (count * halves, rows // halves, width))
    return [reshape(take(split, 0, i, i + 1), (rows // halves, width)) for i in range(count * halves)]
