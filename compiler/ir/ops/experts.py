"""Experts: gated MLPs, of which each token takes a few.

Shapes in the docs: D width, F inner width, E experts, K experts per token, N tokens flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compiler.ir.opdef import Attr, OpDef, Types
from compiler.ir.ops.elementwise import need
from compiler.ir.ops.nn import same_dim
from compiler.ir.types import TensorType, dim_product


def _infer_experts(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, indices, weights, gate_up, down = (need(type) for type in types[:5])
    same_dim(gate_up.shape[2], x.shape[1], "input widths")
    same_dim(gate_up.shape[1], dim_product((2, down.shape[2])), "inner widths")
    same_dim(gate_up.shape[0], down.shape[0], "numbers of experts")
    if indices.shape != weights.shape or indices.shape[0] != x.shape[0]:
        raise ValueError(f"indices {indices} and weights {weights} do not fit the tokens {x}")
    return [x.with_shape((x.shape[0], down.shape[1]))]


def gate(gate_up: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    """The gated unit of an expert: [..., 2F], first the gate and then the up half, to [..., F]."""
    gate, up = gate_up.chunk(2, -1)
    if activation == "clamped_swish":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return GATES[activation](gate) * up


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": torch.relu,
}


def _eval_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    out = x.new_zeros(x.shape[0], down.shape[1])
    for expert in indices.unique().tolist():
        token, slot = torch.where(indices == expert)
        inner = F.linear(x[token], gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
        inner = gate(inner, activation, alpha, limit)
        result = F.linear(inner, down[expert], None if down_bias is None else down_bias[expert])
        out.index_add_(0, token, result * weights[token, slot, None])
    return out


OPS = (
    OpDef(
        "experts",
        "x indices weights gate_up down gate_up_bias? down_bias?",
        _infer_experts,
        _eval_experts,
        {
            "activation": Attr("text", choices=(*GATES, "clamped_swish")),
            "alpha": Attr("float", 1.0),
            "limit": Attr("float", 0.0),
        },
        axes="n d, n k!, n k!, e~ (two! f) d, e~ d f, e~ (two! f)?, e~ d? -> n d",
        doc="Sum over k of weights[:, k] * expert indices[:, k] of x [N, D]. An expert is down (gate(g) * u) with "
        "g, u the halves of gate_up x: gate_up [E, 2F, D], down [E, D, F], biases [E, 2F] and [E, D]. "
        "`clamped_swish` is (clip(u, +-limit) + 1) * m * sigmoid(alpha m) with m = min(g, limit).",
    ),
)
