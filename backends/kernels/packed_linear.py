"""Linear map whose weight is codes of 2 to 8 bits, packed densely, with a scale for each group of inputs.

    y = x · Wᵀ,   W[n, k] = (code[n, k] - zero[n, g]) · scale[n, g],   g = k // (K / G)

How codes and zero points lie in their words: packed_weight.py.
"""

# pyright: basic
from __future__ import annotations

from torch import Tensor

from .launch import Plan, first_reason, operation
from .packed_weight import dense, on_cpu


def reference(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """y [..., N] in x's dtype, summed in float32.

    x [..., K] floating point, ``words`` int32 [N, ceil(K · bits / 32)], ``scales`` [N, G] floating point, ``zeros``
    int32 [ceil(N · bits / 32), G] or None.
    """
    return (x.float() @ dense(words, scales, zeros, bits, x.shape[-1]).mT).to(x.dtype)


def outside(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> str | None:
    """Why the inputs are not for the kernels."""
    return first_reason([(False, "there is no kernel yet")])


def plan(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Plan:
    """Nothing."""
    return Plan(reference(x, words, scales, zeros, bits), [])


def packed_linear(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """y [..., N], as ``reference`` says."""
    return on_cpu(x, words, scales, zeros, bits)


def _shaped(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


packed_linear = operation(packed_linear, reference, plan, outside, _shaped)
