"""Groups of a size found for each matrix, from what is lost and what scales take (after FineQuant, arXiv 2308.09723).

A bit more makes rounding errors half as large: a size is worth its scales where it lowers the squared error, times 4 to
the power of the bits a weight that its scales and zero points take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from compiler.ir.graph import Graph, Param
from compiler.pipeline import Context
from compiler.weights.ops.codec import Codec, row_chunks
from passes.quantize.mixed import together

if TYPE_CHECKING:
    from passes.quantize import Quantize

SIZES = (0, 256, 128, 64, 32)
"""Inputs that may share a scale; 0: all of a row."""
PLANNED = 128  # at most, where no weight is read


def searched(graph: Graph, ctx: Context, wanted: Quantize, params: Sequence[Param]) -> dict[Param, int]:
    """The size of groups of each of ``params``; matrices that multiply the same value get the same."""
    ctx.read_weights = True  # also where a plan does without: sizes depend on them
    found: dict[Param, int] = {}
    for group in together(graph, params):
        width = min(param.type.static_shape[-1] for param in group)
        sizes = [size for size in SIZES if not size or (size < width and width % size == 0)]
        if ctx.planned:
            size = next((size for size in sizes if 0 < size <= PLANNED), 0)
        else:
            losses = [_loss(ctx, wanted, group, size) for size in sizes]
            size = sizes[losses.index(min(losses))]
        found.update(dict.fromkeys(group, size))
    return found


def _loss(ctx: Context, wanted: Quantize, group: Sequence[Param], size: int) -> float:
    error = overhead = numbers = 0.0
    for param in group:
        error += rounding_loss(ctx.read(param), wanted.system(int(wanted.bits), size).codec(param.storage))
        scale = param.storage.itemsize * 8
        zeros = 0 if wanted.symmetric else scale if wanted.zeros == "real" else wanted.bits
        overhead += (scale + zeros) * param.type.numel / (size or param.type.static_shape[-1])
        numbers += param.type.numel
    return error * 4 ** (overhead / numbers)


def rounding_loss(weight: Tensor, codec: Codec) -> float:
    """The squared error of rounding ``weight`` [..., out, in] to nearest. Some rows at a time: whole matrices of codes
    and values would take several times what a matrix does."""
    error = 0.0
    for (rows,) in row_chunks([weight.flatten(0, -2)]):
        values = rows.float().unflatten(-1, (-1, codec.group or rows.shape[-1]))
        parameters = codec.fit(values)
        error += float((codec.decode(codec.encode(values, parameters), parameters) - values).square().sum())
    return error
