"""RMSNorm with the residual addition before it, as codes of 8 bits for a product of integers behind it.

    s = x + residual;   y = s / sqrt(mean(s²) + epsilon) · weight
    scale = max|y| / 127.5;   codes = round(y / scale) within -128 and 127

One program normalises one row, which stays in registers. Bytes moved: x, residual and weight once, codes, s and a scale
a row once. Scales and codes are chosen as by the graph's ``fake_quantize`` of 8 bits, of values that are not rounded
before.
"""

# pyright: basic, reportOperatorIssue=false
from __future__ import annotations

import torch
from torch import Tensor

from .launch import Launch, Plan, first_reason, jit, operation, power_of_two, tl

# Widest row -> warps that share it.
WARPS = {1024: 4, 4096: 8, 32768: 16}
EPSILON = torch.finfo(torch.float32).eps  # the scale of a row of zeros


def reference(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int8 [..., n], scales float32 [..., 1] and s [..., n] in x's dtype. ``weight`` [n]."""
    total = x.clone() if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = total.float()
    y = wide / torch.sqrt(wide.square().sum(-1, keepdim=True) / x.shape[-1] + epsilon) * weight.float()
    scale = y.abs().amax(-1, keepdim=True) / 127.5
    scale = torch.where(scale == 0, EPSILON, scale)
    return (y / scale).round().clamp(-128, 127).to(torch.int8), scale, total


@jit
def _rms_norm_quantized(
    x, residual, weight, codes, scales, total, n, size, epsilon, least, RESIDUAL: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    inside = column < n
    value = tl.load(x + row * n + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + row * n + column, mask=inside, other=0.0).to(tl.float32)
    rounded = value.to(total.dtype.element_ty)
    tl.store(total + row * n + column, rounded, mask=inside)
    value = rounded.to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    y = tl.div_rn(value, tl.sqrt_rn(tl.div_rn(tl.sum(value * value), size) + epsilon)) * gain
    scale = tl.div_rn(tl.max(tl.abs(y)), 127.5)
    scale = tl.where(scale == 0, least, scale)
    tl.store(scales + row, scale)
    nearest = (tl.div_rn(y, scale) + 12582912.0) - 12582912.0  # 1.5 * 2^23: sums above it are whole, rounded to even
    code = tl.minimum(tl.maximum(nearest, -128.0), 127.0).to(tl.int8)
    tl.store(codes + row * n + column, code, mask=inside)


def outside(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> str | None:
    """Why the inputs are not for the kernel."""
    return first_reason(
        [
            (x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"{x.dtype} is no dtype of activations"),
            (residual is None or residual.dtype == x.dtype, "the residual has another dtype"),
            (x.shape[-1] <= max(WARPS), f"rows of {x.shape[-1]} elements do not stay in registers"),
        ]
    )


def plan(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> Plan:
    """One program a row."""
    n = x.shape[-1]
    x = x.contiguous()
    codes, total = torch.empty_like(x, dtype=torch.int8), torch.empty_like(x)
    scales = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    arguments = {
        "x": x,
        "residual": x if residual is None else residual.contiguous(),
        "weight": weight,
        "codes": codes,
        "scales": scales,
        "total": total,
        "n": n,
        "size": float(n),
        "epsilon": epsilon,
        "least": EPSILON,
    }
    constants = {"RESIDUAL": residual is not None, "WIDTH": power_of_two(n)}
    warps = next(count for widest, count in WARPS.items() if n <= widest)
    return Plan((codes, scales, total), [Launch(_rms_norm_quantized, (x.numel() // n,), arguments, constants, warps)])


def rms_norm_quantized(
    x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and s, as ``reference`` says."""
    return reference(x, residual, weight, epsilon)


def _shaped(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    scales = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    return torch.empty_like(x, dtype=torch.int8), scales, torch.empty_like(x)


rms_norm_quantized = operation(rms_norm_quantized, reference, plan, outside, _shaped)
