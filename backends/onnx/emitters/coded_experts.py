"""Experts that multiply by their codes: all of them are one QMoE of ONNX Runtime.

It is given which experts are chosen and their weights as two matrices [N, E]; rows of the gate and the up half of a
projection take turns in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder
from backends.onnx.quantised import block_of, native_block, unsigned_bytes
from compiler.ir.graph import Node, Param, Value
from compiler.weights.expr import Expr, apply
from compiler.weights.ops.basic import cast, repeat, reshape, transpose

BITS = 4
GATES = {"silu": {"activation_alpha": 1.0, "activation_beta": 0.0}}


def coded_experts(build: Builder, node: Node) -> ir.Value | None:
    """What experts give for tokens [N, D]; None when no kernel multiplies by their codes."""
    stacks = [value for value in node.inputs[3:5] if isinstance(value, Param) and value.expr.op == "dequantize"]
    gate = _gate(node)
    if build.target.real != torch.float32 or not build.target.contrib or len(stacks) < 2 or gate is None:
        return None
    blocks = {block_of(param.expr.attr("group") or param.expr.shape[-1]) for param in stacks}
    block = blocks.pop()
    if blocks or not native_block(block) or any(not _fits(param, block) for param in stacks):
        return None
    x, indices, weights = (build.arg(node, index) for index in range(3))
    chosen, shares = _by_expert(build, node, indices, weights)
    parts = [_parts(build, param, block, paired=first) for param, first in zip(stacks, (True, False), strict=True)]
    biases = [_bias(build, node.optional_input(index), paired=index == 5) for index in (5, 6)]
    (codes, scale, zero), (down, down_scale, down_zero) = parts
    nothing: Sequence[ir.Value | None] = (None, None, None)
    zeros = (zero, down_zero, None)
    return build.contrib(
        "QMoE", x, chosen, codes, scale, biases[0], down, down_scale, biases[1], *nothing, *zeros, shares,
        k=int(node.input(1).shape[1]), activation_type="swiglu", swiglu_fusion=1, expert_weight_bits=BITS,
        block_size=block, accuracy_level=build.accuracy, normalize_routing_weights=0, **gate,
    )  # fmt: skip


def _gate(node: Node) -> dict[str, float] | None:
    """The attributes of the gated unit; None for one that the kernel does not have."""
    if node.attr("activation") == "clamped_swish":
        alpha, limit = float(node.attr("alpha")), float(node.attr("limit"))
        return {"activation_alpha": alpha, "activation_beta": 1.0, "swiglu_limit": limit}
    return GATES.get(node.attr("activation"))


def _fits(param: Param, block: int) -> bool:
    return param.expr.attr("bits") in (3, BITS) and param.expr.shape[-1] % block == 0


def _by_expert(build: Builder, node: Node, indices: ir.Value, weights: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Which experts each token chose, and their weights, [N, E]."""
    count = node.input(3).shape[0]
    hot = build.op("OneHot", indices, build.ints(int(count)), build.constant(torch.tensor([0.0, 1.0])), axis=-1)
    weighted = build.op("Mul", hot, build.op("Unsqueeze", weights, build.ints(2)))
    chosen, shares = (build.op("ReduceSum", value, build.ints(1), keepdims=0) for value in (hot, weighted))
    return chosen, shares


def _parts(build: Builder, param: Param, block: int, *, paired: bool) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Codes, scales and zero points of a stack [E, R, C]; ``paired`` rows of its two halves take turns."""
    codes, scale, *zero = (_paired(part) if paired else part for part in param.expr.args)
    experts, rows, width = codes.shape
    times = (param.expr.attr("group") or width) // block
    packed = apply("pack_bits", [codes], {"bits": BITS, "axis": -1})
    stored = build.store(f"{param.name}.codes", packed, ir.DataType.UINT8, (experts, rows, width * BITS // 8))
    scales = build.store(f"{param.name}.scale", repeat(cast(scale, torch.float32), -1, times))
    if not zero:
        return stored, scales, None
    flat = unsigned_bytes(reshape(repeat(zero[0], -1, times), (experts * rows, width // block)), BITS)
    shape = (experts, rows, flat.shape[-1])
    return stored, scales, build.store(f"{param.name}.zero", flat, ir.DataType.UINT8, shape)


def _paired(part: Expr) -> Expr:
    """[E, 2 F, ...], first one half and then the other, with their rows in turns."""
    experts, rows, *rest = part.shape
    halves = reshape(part, (experts, 2, rows // 2, *rest))
    return reshape(transpose(halves, (0, 2, 1, *range(3, 3 + len(rest)))), part.shape)


def _bias(build: Builder, value: Value | None, *, paired: bool) -> ir.Value | None:
    if not isinstance(value, Param):
        return None
    expr = build.dense(value)
    return build.store(f"{value.name}.in-turns", _paired(expr)) if paired else build.value(value)
