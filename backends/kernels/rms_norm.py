"""Root-mean-square normalisation, with the residual addition before it in the same launch.

    s = x + residual;   y = s / sqrt(mean(s²) + epsilon) · weight

One program normalises one row, which stays in registers. Bytes moved: x, residual and weight once, y and s once.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

from .launch import Launch, Plan, first_reason, jit, operation, power_of_two, tl

# Widest row -> warps that share it.
WARPS = {1024: 4, 4096: 8, 32768: 16}


def reference(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y and s [..., n], both in x's dtype; what is rounded is only the result. ``weight`` [n]."""
    total = x.clone() if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * scale * weight.float()).to(x.dtype), total


@jit
def _rms_norm(x, residual, weight, y, total, n, epsilon, RESIDUAL: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, WIDTH)
    inside = column < n
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        value += tl.load(residual + row + column, mask=inside, other=0.0).to(tl.float32)
    rounded = value.to(y.dtype.element_ty)
    tl.store(total + row + column, rounded, mask=inside)
    value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / n + epsilon)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row + column, (value * scale * gain).to(y.dtype.element_ty), mask=inside)


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
    y, total = torch.empty_like(x), torch.empty_like(x)
    arguments = {
        "x": x,
        "residual": x if residual is None else residual.contiguous(),
        "weight": weight,
        "y": y,
        "total": total,
        "n": n,
        "epsilon": epsilon,
    }
    constants = {"RESIDUAL": residual is not None, "WIDTH": power_of_two(n)}
    warps = next(count for widest, count in WARPS.items() if n <= widest)
    return Plan((y, total), [Launch(_rms_norm, (x.numel() // n,), arguments, constants, warps)])


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """y and s [..., n], as ``reference`` says."""
    return reference(x, residual, weight, epsilon)


def _shaped(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


rms_norm = operation(rms_norm, reference, plan, outside, _shaped)
