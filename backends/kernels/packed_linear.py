"""Linear map whose weight is codes of 2 to 8 bits, packed densely, with a scale for each group of inputs.

    y = x · Wᵀ,   W[n, k] = (code[n, k] - zero[n, g]) · scale[n, g],   g = k // (K / G)

Code k of a row lies in the bits from k · bits on of its words, little-endian, so that 32 codes fill ``bits`` words.
Zero points lie in the same way along the columns of theirs, and are 2^(bits-1) where there are none. This is the layout
of compressed-tensors' ``pack-quantized``.
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

from .launch import Plan, first_reason, operation


def reference(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """y [..., N] in x's dtype, summed in float32.

    x [..., K] floating point, ``words`` int32 [N, ceil(K · bits / 32)], ``scales`` [N, G] floating point, ``zeros``
    int32 [ceil(N · bits / 32), G] or None.
    """
    return (x.float() @ dense(words, scales, zeros, bits, x.shape[-1]).mT).to(x.dtype)


def dense(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int) -> Tensor:
    """W float32 [N, width]."""
    codes = unpacked(words, bits, width).unflatten(-1, (scales.shape[-1], -1))
    return ((codes - zero_points(scales, zeros, bits)[..., None]) * scales.float()[..., None]).flatten(-2)


def zero_points(scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """int32 [N, G]."""
    if zeros is None:
        return torch.full_like(scales, 2 ** (bits - 1), dtype=torch.int32)
    return unpacked(zeros.mT, bits, scales.shape[0]).mT


def unpacked(words: Tensor, bits: int, width: int) -> Tensor:
    """Codes int32 [rows, width], unsigned, of ``words`` int32 [rows, ceil(width · bits / 32)]."""
    bit = torch.arange(width, device=words.device) * bits
    word, offset = bit // 32, bit % 32
    following = (word + 1).clamp(max=words.shape[-1] - 1)
    both = (words[..., following].long() << 32) | (words[..., word].long() & 0xFFFFFFFF)
    return ((both >> offset) & (2**bits - 1)).int()


def outside(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> str | None:
    """Why the inputs are not for the kernels."""
    return first_reason([(False, "there is no kernel yet")])


def plan(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Plan:
    """Nothing."""
    return Plan(reference(x, words, scales, zeros, bits), [])


def packed_linear(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """y [..., N], as ``reference`` says."""
    return reference(x, words, scales, zeros, bits)


def _shaped(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


packed_linear = operation(packed_linear, reference, plan, outside, _shaped)
