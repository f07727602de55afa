"""Products of int8 with int8: what ONNX Runtime multiplies fastest where there are many tokens.

Each token's inputs are rounded with a scale of their own, as ``fake_quantize`` does: x ~ (u - 128) m / 127.5 with m the
token's largest magnitude. Weights have one scale a row. Inputs are unsigned since kernels for x86 are fast for unsigned
times signed; without VNNI these add pairs of products in 16 bits and saturate.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder, exactly
from compiler.ir.graph import Param
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import cast, reshape, transpose
from compiler.weights.ops.quant import quantise

STEP = 1 / 127.5
MIDDLE = 128  # what an unsigned code of zero is
TINY = 2.0**-100


def multiplied_in_int8(build: Builder, x: ir.Value, weight: Param, bias: ir.Value | None) -> ir.Value:
    """x @ weight.T + bias for a quantised ``weight``, whose values are rounded again, to 8 bits with a scale a row."""
    codes, scale = quantise(exactly(weight.expr), 8, 0, scale_dtype=torch.float32).args
    rounded, largest = _rounded(build, x)
    product = _product(build, weight.name, rounded, codes, scale)
    made = build.op("Mul", product, largest)
    return made if bias is None else build.op("Add", made, bias)


def _rounded(build: Builder, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Unsigned codes of ``x``, and each token's largest magnitude; several products of one input share them."""
    name = f"codes of {x.name}"
    if name not in build.shared:
        largest = build.op("ReduceMax", build.op("Abs", x), build.ints(-1), keepdims=1)
        largest = build.op("Max", largest, build.scalar(TINY))
        shares = build.op("Div", x, largest)
        build.shared[name] = (build.op("QuantizeLinear", shares, _step(build), _middle(build)), largest)
    codes, largest = build.shared[name]
    return codes, largest


def _product(build: Builder, name: str, rounded: ir.Value, codes: Expr, scale: Expr) -> ir.Value:
    rows, width = codes.shape
    held = build.store(f"{name}.int8", transpose(codes, (1, 0)), ir.DataType.INT8, (width, rows))
    scales = build.store(f"{name}.int8-scale", reshape(cast(scale, torch.float32), (rows,)))
    return build.contrib("MatMulIntegerToFloat", rounded, held, _step(build), scales, _middle(build))


def _step(build: Builder) -> ir.Value:
    return build.constant(torch.tensor(STEP, dtype=torch.float32))


def _middle(build: Builder) -> ir.Value:
    return build.constant(torch.tensor(MIDDLE, dtype=torch.uint8))
