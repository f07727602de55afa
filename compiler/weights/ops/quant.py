"""Uniform integer quantisation of weights: zero points, scales, codes, and codes packed into words.

A weight w [..., out, in] is cut along its last axis into groups of ``group`` inputs (0: the whole row). Every group
has a scale s and, when asymmetric, a zero point z; its codes are integers q of ``bits`` bits in
[-2^(bits-1), 2^(bits-1) - 1] that stand for (q - z) * s.

Scales are candidates amplitude * c / 2^m, where the amplitude is the largest magnitude (m = bits - 1) or, when
asymmetric, the width of the range widened to contain zero (m = bits). Since a bit more halves a candidate and
keeps c, and a zero point z becomes 2z or 2z + 1, everything that b bits can express b + 1 bits can express too:
the least error over the candidates never grows with the number of bits, of symmetric codes up to 7.

There is one negative code more than positive ones. Below 8 bits a group without zero point whose largest magnitude is
a positive number has a negative scale, so that this number gets that code, as in the blocks of llama.cpp and ONNX
Runtime. Scales of 8 bits are positive: engines with products of such integers expect that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from compiler.ir.types import TensorType
from compiler.weights.expr import Expr, apply
from compiler.weights.ops import Attrs, WeightOp, take_rows
from compiler.weights.ops.codec import CHUNK_ELEMENTS, least, weighted_squares

POSITIVE_BITS = 8
SHRINK_FACTORS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5, 0.4)


def quantise(
    weight: Expr,
    bits: int,
    group: int,
    *,
    symmetric: bool = True,
    search: bool = True,
    power: float = 2.0,
    scale_dtype: torch.dtype,
) -> Expr:
    """``weight`` [..., out, in] rounded to the nearest of ``bits``-bit codes: a ``dequantize`` expression.

    ``group`` divides ``in``, or is 0 for one scale a row. With ``search`` every group takes the scale of the least sum
    of errors to the ``power`` among a small grid, otherwise the smallest that clips nothing. Values are of its dtype.
    Raises OpError when the group does not divide the input width.
    """
    attrs = {"bits": bits, "group": group}
    zero = () if symmetric else (apply("quant_zero", [weight], attrs),)
    how = {"search": search, "dtype": scale_dtype} | ({} if power == 2.0 else {"power": power})
    scale = apply("quant_scale", [weight, *zero], {**attrs, **how})
    codes = apply("quantize", [weight, scale, *zero], {"bits": bits})
    return apply("dequantize", [codes, scale, *zero], attrs)


def pack_bits(codes: Expr, bits: int, axis: int = -1) -> Expr:
    """Signed ``codes`` of ``bits`` bits packed densely into int32 words along ``axis`` (-1 or -2)."""
    return apply("pack_bits", [codes], {"bits": bits, "axis": axis})


def packed_parts(value: Expr) -> tuple[Expr, ...]:
    """The codes of a ``dequantize`` [..., out, in] packed along rows, its scales, and its zero points along columns.

    Of a ``dequantize_codebook`` its codes, packed alike, and its tables; of a ``dequantize_real`` zero points as they
    are.
    """
    bits = value.attr("bits")
    codes, scale, *zero = value.args
    if value.op == "dequantize_real":
        return pack_bits(codes, bits), scale, *zero
    return pack_bits(codes, bits), scale, *(pack_bits(part, bits, axis=-2) for part in zero)


def group_count(width: int, group: int) -> int:
    if group and width % group:
        raise ValueError(f"groups of {group} do not divide {width} inputs")
    return width // group if group else 1


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:-1], groups, -1)


def code_range(bits: int) -> tuple[int, int]:
    """The least and the largest code of ``bits`` bits."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _row_chunks(weight: Tensor, others: Sequence[Tensor | None]) -> Iterator[tuple[Tensor, list[Tensor | None]]]:
    """Rows of ``weight`` and of what goes with them, few enough that float32 temporaries stay in the cache."""
    rows = weight.reshape(-1, weight.shape[-1])
    step = max(1, CHUNK_ELEMENTS // weight.shape[-1])
    flat = [None if other is None else other.reshape(-1, other.shape[-1]) for other in others]
    for start in range(0, rows.shape[0], step):
        stop = start + step
        yield rows[start:stop].float(), [None if other is None else other[start:stop] for other in flat]


# --- zero points -------------------------------------------------------------------------------------------------


def _infer_per_group(types: Sequence[TensorType], attrs: Attrs) -> tuple[int, ...]:
    *rows, width = types[0].static_shape
    return (*rows, group_count(width, attrs["group"]))


def _bounds(grouped: Tensor) -> tuple[Tensor, Tensor]:
    """The range of every group, widened to contain zero."""
    return grouped.amin(-1).clamp(max=0.0), grouped.amax(-1).clamp(min=0.0)


def _infer_zero(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    return TensorType(torch.int8, _infer_per_group(types, attrs))


def _compute_zero(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    weight, bits = tensors[0], attrs["bits"]
    groups = group_count(weight.shape[-1], attrs["group"])
    parts = [zeros_of(_grouped(rows, groups), bits) for rows, _ in _row_chunks(weight, ())]
    return torch.cat(parts).reshape(*weight.shape[:-1], groups)


def zeros_of(grouped: Tensor, bits: int) -> Tensor:
    """Zero points int8 [...] of groups float32 [..., group]."""
    low, high = _bounds(grouped)
    least, most = code_range(bits)
    span = (high - low).double()
    below = torch.where(span > 0, low.double() / span.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    return (least - below * (1 << bits)).floor().clamp(least, most).to(torch.int8)


# --- scales ------------------------------------------------------------------------------------------------------


def _infer_scale(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    if not attrs["dtype"].is_floating_point:
        raise ValueError("scales are floating-point")
    return TensorType(attrs["dtype"], _infer_per_group(types, attrs))


def _compute_scale(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    weight, zero = tensors[0], tensors[1] if len(tensors) > 1 else None
    groups, bits, dtype = group_count(weight.shape[-1], attrs["group"]), attrs["bits"], attrs["dtype"]
    parts = [
        scales_of(_grouped(rows, groups), zeros, bits, dtype, search=attrs["search"], power=attrs.get("power", 2.0))
        for rows, (zeros,) in _row_chunks(weight, [zero])
    ]
    return torch.cat(parts).reshape(*weight.shape[:-1], groups)


def scales_of(
    grouped: Tensor,
    zero: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    *,
    search: bool,
    weights: Tensor | None = None,
    power: float = 2.0,
) -> Tensor:
    """Scales [...] of groups float32 [..., group]: without ``search`` those that clip nothing.

    With it the candidates of least error to the ``power``, each element's times its weight.
    """
    low, high = _bounds(grouped)
    amplitude = torch.maximum(-low, high) if zero is None else high - low
    exponent = bits - 1 if zero is None else bits
    if not search:
        return _rounded_scale(amplitude, _unclipped(exponent), exponent, dtype)
    if zero is None and bits < POSITIVE_BITS:
        amplitude = torch.where(high > -low, -high, -low)
    scales = (_rounded_scale(amplitude, factor, exponent, dtype) for factor in candidate_factors(exponent))
    return least((scale, _error(grouped, scale.float(), zero, bits, weights, power)) for scale in scales)


def candidate_factors(exponent: int) -> list[float]:
    """The c of every candidate: shrinkages, and for every smaller number of bits the scale that clips nothing.

    The largest, 2, makes the amplitude a power of two of steps, so that a group of zeros and equal numbers is exact.
    """
    return [*SHRINK_FACTORS, *(_unclipped(m) for m in range(1, exponent + 1))]


def _unclipped(exponent: int) -> float:
    return (1 << exponent) / ((1 << exponent) - 1)


def _rounded_scale(amplitude: Tensor, factor: float, exponent: int, dtype: torch.dtype) -> Tensor:
    """A candidate with the sign of ``amplitude``, rounded to the dtype it is stored in; 1 for zeros, never 0."""
    scale = (amplitude * math.ldexp(factor, -exponent)).to(dtype)
    return torch.where(amplitude != 0, away_from_zero(scale), torch.ones((), dtype=dtype))


def away_from_zero(scale: Tensor) -> Tensor:
    """``scale`` of at least the least normal magnitude of its dtype, with its sign."""
    return scale.abs().clamp(min=torch.finfo(scale.dtype).tiny).copysign(scale)


def _error(
    grouped: Tensor, scale: Tensor, zero: Tensor | None, bits: int, weights: Tensor | None, power: float
) -> Tensor:
    error = codes_of(grouped, scale, zero, bits)
    if zero is not None:
        error -= zero.unsqueeze(-1)
    error.mul_(scale.unsqueeze(-1)).sub_(grouped)
    return weighted_squares(error if power == 2.0 else error.abs_().pow_(power / 2), weights)


# --- codes -------------------------------------------------------------------------------------------------------


def codes_of(grouped: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The nearest codes, as floats, of groups float32 [..., group] with scales and zero points [...]."""
    codes = grouped / scale.unsqueeze(-1)
    if zero is not None:
        codes += zero.unsqueeze(-1)
    return codes.round_().clamp_(*code_range(bits))


def _infer_quantize(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    weight, scale = types[0], types[1]
    if weight.static_shape[:-1] != scale.static_shape[:-1]:
        raise ValueError(f"scales {scale} do not go with {weight}")
    group_count(weight.static_shape[-1], weight.static_shape[-1] // scale.static_shape[-1])
    if any(zero.static_shape != scale.static_shape for zero in types[2:]):
        raise ValueError("there are as many zero points as scales")
    return weight.with_dtype(torch.int8)


def _compute_quantize(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    weight, scale, zero = tensors[0], tensors[1], tensors[2] if len(tensors) > 2 else None
    groups = scale.shape[-1]
    codes = torch.empty(weight.shape, dtype=torch.int8).reshape(-1, weight.shape[-1])
    start = 0
    for rows, (scales, zeros) in _row_chunks(weight, [scale, zero]):
        assert scales is not None  # only the zero point may be absent
        part = codes_of(_grouped(rows, groups), scales.float(), zeros, attrs["bits"])
        codes[start : start + len(rows)] = part.reshape(rows.shape)
        start += len(rows)
    return codes.reshape(weight.shape)


def infer_dequantized(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    """The type of codes [..., in] with scales and zero points. Raises ValueError where these do not go together."""
    codes, scale = types[0], types[1]
    if codes.dtype != torch.int8 or _infer_per_group(types, attrs) != scale.static_shape:
        raise ValueError(f"scales {scale} do not go with codes {codes} in groups of {attrs['group']}")
    return codes.with_dtype(scale.dtype)


def dequantized(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    """(q - z) * s in the dtype of the scale: the weights that a loader computes with."""
    codes, scale = tensors[0], tensors[1]
    values = _grouped(codes, scale.shape[-1]).to(scale.dtype)
    if len(tensors) > 2:
        values -= tensors[2].unsqueeze(-1).to(scale.dtype)
    return values.mul_(scale.unsqueeze(-1)).reshape(codes.shape)


# --- packing -----------------------------------------------------------------------------------------------------


def _packed_width(width: int, bits: int) -> int:
    return math.ceil(width * bits / 32)


def _infer_pack(types: Sequence[TensorType], attrs: Attrs) -> TensorType:
    shape, axis = list(types[0].static_shape), attrs["axis"]
    if types[0].dtype != torch.int8 or axis not in (-1, -2):
        raise ValueError("int8 codes are packed along axis -1 or -2")
    shape[axis] = _packed_width(shape[axis], attrs["bits"])
    return TensorType(torch.int32, tuple(shape))


def _compute_pack(tensors: Sequence[Tensor], attrs: Attrs) -> Tensor:
    """Element i of a row occupies the bits from i * bits on, little-endian, offset to be unsigned."""
    rows = tensors[0] if attrs["axis"] == -1 else tensors[0].mT
    nibbles = attrs["bits"] == 4 and rows.shape[-1] % 8 == 0
    words = _packed_nibbles(rows) if nibbles else _packed(rows, attrs["bits"])
    return words if attrs["axis"] == -1 else words.mT.contiguous()


def _packed(codes: Tensor, bits: int) -> Tensor:
    width = codes.shape[-1]
    words = torch.zeros(*codes.shape[:-1], _packed_width(width, bits), dtype=torch.int32)
    for first in range(min(32, width)):  # 32 elements fill exactly `bits` words, so each residue has one place in them
        values = codes[..., first::32].to(torch.int32) + (1 << (bits - 1))
        _place(words, values, first * bits, bits)
    return words


def _packed_nibbles(codes: Tensor) -> Tensor:
    """The common case, several times faster: two codes in their two bytes are one 16-bit word with gaps."""
    spread = (codes + 8).flatten().view(torch.int16)
    words = (spread | (spread >> 4)).to(torch.uint8).view(torch.int32)
    return words.reshape(*codes.shape[:-1], codes.shape[-1] // 8)


def _place(words: Tensor, values: Tensor, bit: int, bits: int) -> None:
    """Or ``values`` [..., n] into ``words`` at ``bit`` of every run of ``bits`` words."""
    word, offset = divmod(bit, 32)
    count = values.shape[-1]
    words[..., word::bits][..., :count] |= values << offset
    if offset + bits > 32:
        words[..., word + 1 :: bits][..., :count] |= values >> (32 - offset)


def _take_packed(expr: Expr, axis: int, start: int, stop: int) -> Expr | None:
    packed_rows = expr.attr("axis") == -2 and expr.type.rank == 2
    return None if packed_rows else take_rows(expr, axis, start, stop)


OPS = (
    WeightOp("quant_zero", _infer_zero, _compute_zero, take_rows),
    WeightOp("quant_scale", _infer_scale, _compute_scale, take_rows),
    WeightOp("quantize", _infer_quantize, _compute_quantize, take_rows),
    WeightOp("dequantize", infer_dequantized, dequantized, take_rows),
    WeightOp("pack_bits", _infer_pack, _compute_pack, _take_packed),
)
