"""The matrix that densely packed codes stand for, written out.

    W[n, k] = (code[n, k] - zero[n, g]) · scale[n, g],   g = k // (K / G)

How codes and zero points lie in their words: packed_weight.py. Bytes moved: words, scales and zero points once, W once.
"""

# pyright: basic
from __future__ import annotations

from torch import Tensor

from .launch import Plan, first_reason, operation
from .packed_linear import UNIT, Tile, packed_arguments, packed_constants, widened
from .packed_weight import dense

TILE = Tile("widened", 1, 16, 16, 4, 1)


def reference(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int) -> Tensor:
    """W [N, width] in the dtype of ``scales`` [N, G], of ``words`` int32 [N, ceil(width · bits / 32)]."""
    return dense(words, scales, zeros, bits, width).to(scales.dtype)


def outside(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int) -> str | None:
    """Why the inputs are not for the kernel."""
    groups = scales.shape[-1]
    return first_reason(
        [
            (2 <= bits <= 8, f"codes of {bits} bits"),
            (width % (UNIT * groups) == 0, f"{groups} groups of {width} inputs are not of a multiple of {UNIT}"),
            (words.is_contiguous() and scales.is_contiguous(), "the weight is not contiguous"),
            (zeros is None or zeros.is_contiguous(), "the zero points are not contiguous"),
        ]
    )


def plan(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int, tile: Tile | None = None) -> Plan:
    """One launch."""
    tile = tile or TILE
    weight = _shaped(words, scales, zeros, bits, width)
    constants = {**packed_constants(weight, scales, zeros, bits), "ROWS": tile.rows, "UNITS": tile.units}
    return Plan(weight, [widened(weight, packed_arguments(weight, words, scales, zeros), constants, tile)])


def packed_dense(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int) -> Tensor:
    """W, as ``reference`` says."""
    return reference(words, scales, zeros, bits, width)


def _shaped(words: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, width: int) -> Tensor:
    return scales.new_empty(words.shape[0], width)


packed_dense = operation(packed_dense, reference, plan, outside, _shaped)
