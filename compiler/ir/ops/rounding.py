"""What a runtime does to activations that it quantises: round them to codes and take these for the values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compiler.ir.opdef import Attr, OpDef, Types
from compiler.ir.types import TensorType

E4M3_MAX = 448.0


def _infer(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    found = types[0]
    if found is None or not found.dtype.is_floating_point:
        raise ValueError("only floating tensors are quantised")
    if attrs.get("scale", 0.0) < 0:
        raise ValueError("the scale is negative")
    return [found]


def _eval(x: Tensor, *, type: str, bits: int, scale: float) -> Tensor:
    largest = E4M3_MAX if type == "fp8" else (2**bits - 1) / 2
    own = torch.tensor(scale, dtype=x.dtype) if scale else x.detach().abs().amax(-1, keepdim=True) / largest
    rounded = _rounded(x.detach(), torch.where(own == 0, torch.finfo(x.dtype).eps, own), type, bits)
    # rounding has no slope of its own: gradients, which are only measured, pass it as if it were not there
    return x + (rounded - x).detach() if x.requires_grad else rounded


def _rounded(x: Tensor, scale: Tensor, type: str, bits: int) -> Tensor:
    if type == "fp8":
        return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return (x / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).round() * scale


OPS: tuple[OpDef, ...] = (
    OpDef(
        "fake_quantize",
        "x",
        _infer,
        _eval,
        {"type": Attr("text", "int", ("int", "fp8")), "bits": Attr("int", 8), "scale": Attr("float", 0.0)},
        axes="... -> ...",
        doc="x rounded to `bits`-bit codes, integers or e4m3, times `scale`; 0: one from each last axis's largest |x|.",
    ),
)
