"""Quantised weights as ONNX holds them: codes of 2, 4 or 8 bits, unsigned and packed, with a scale for every block.

A graph's ``dequantize(codes, scale[, zero])`` stands for (q - z) s with signed codes in groups along the inputs. ONNX
Runtime's MatMulNBits multiplies by (u - v) s with u = q + 2^(bits-1), v = z + 2^(bits-1) and blocks of a power of two;
wider groups are cut into such blocks, fewer bits stored in the next width that kernels know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder
from compiler.ir.graph import Param
from compiler.weights.expr import Expr, apply
from compiler.weights.ops.basic import add, cast, concat, full, index, mul, pad, repeat, reshape

LARGEST_BLOCK = 256
SMALLEST_BLOCK = 16
UNPACKED = "quantised weights are stored as codes, but multiplied dense: no kernel has blocks that divide their width"


@dataclass(frozen=True)
class Packed:
    """A quantised matrix [rows, width]: its codes, and ``blocks`` scales and zero points for each row."""

    name: str
    rows: int
    width: int
    bits: int
    block: int
    codes: Expr
    scale: Expr
    zero: Expr | None

    @property
    def blocks(self) -> int:
        return self.width // self.block

    @property
    def native(self) -> bool:
        """Whether MatMulNBits has these blocks."""
        return native_block(self.block)


def native_block(block: int) -> bool:
    """Whether products with codes have blocks of so many."""
    return SMALLEST_BLOCK <= block <= LARGEST_BLOCK and block & (block - 1) == 0


def packed(build: Builder, weight: Param, *, table: bool = False) -> Packed | None:
    """``weight`` as ONNX holds it; None when it is dense, or no row of its codes fills whole words."""
    if weight.expr.op != "dequantize":
        return None
    codes, scale, *zero = weight.expr.args
    bits = next(width for width in (2, 4, 8) if width >= weight.expr.attr("bits"))
    if not build.target.contrib:
        bits = max(bits, 4)
    rows, width = codes.shape
    if width * bits % 32 or (table and not build.target.contrib):
        return None
    group = weight.expr.attr("group") or width
    block = block_of(group) if build.target.contrib else group
    times = group // block
    parts = [repeat(part, -1, times) for part in (cast(scale, torch.float32), *zero)]
    return Packed(weight.name, rows, width, bits, block, codes, parts[0], parts[1] if zero else None)


def block_of(group: int) -> int:
    """The largest block that kernels have and that divides ``group``; ``group`` itself when there is none."""
    fitting = (1 << power for power in range(8, 3, -1) if group % (1 << power) == 0)
    return next(fitting, group)


def multiplied(build: Builder, x: ir.Value, form: Packed, bias: ir.Value | None) -> ir.Value:
    """x @ weight.T + bias."""
    if not (build.target.contrib and form.native):
        matrix = _dequantised(build, form)
        if build.target.contrib:
            build.note(UNPACKED)
        product = build.op("MatMul", x, build.op("Transpose", matrix, perm=(1, 0)))
        return product if bias is None else build.op("Add", product, bias)
    return build.contrib(
        "MatMulNBits",
        x,
        _codes(build, form, (form.rows, form.blocks, form.block * form.bits // 8)),
        build.store(f"{form.name}.scale", form.scale),
        None if form.zero is None else _zeros(build, form, form.zero, ir.DataType.UINT8),
        None,
        bias,
        K=form.width,
        N=form.rows,
        bits=form.bits,
        block_size=form.block,
        accuracy_level=0 if form.name in build.unrounded else build.accuracy,
    )


def gathered(build: Builder, form: Packed, ids: ir.Value) -> ir.Value:
    """The rows of a quantised table at ``ids``."""
    if not form.native:
        return build.op("Gather", _dequantised(build, form), ids, axis=0)
    blocks = _codes(build, form, (form.rows, form.blocks, form.block * form.bits // 8))
    codes = build.op("Reshape", blocks, build.ints(form.rows, -1))  # a product with the same weight has them in blocks
    zero = None if form.zero is None else _zeros(build, form, form.zero, ir.DataType.UINT8)
    return build.contrib(
        "GatherBlockQuantized",
        codes,
        ids,
        build.store(f"{form.name}.scale", form.scale),
        zero,
        bits=form.bits,
        block_size=form.block,
        gather_axis=0,
        quantize_axis=1,
    )


def _codes(build: Builder, form: Packed, shape: Sequence[int], kind: ir.DataType = ir.DataType.UINT8) -> ir.Value:
    words = apply("pack_bits", [form.codes], {"bits": form.bits, "axis": -1})
    return build.store(f"{form.name}.codes", words, kind, shape)


def _zeros(build: Builder, form: Packed, zero: Expr, kind: ir.DataType) -> ir.Value:
    """Zero points, each row's (of a standard operation: all) filling whole bytes."""
    whole = zero if kind == ir.DataType.UINT8 and form.bits < 8 else reshape(zero, (1, zero.type.numel))
    shape = (form.rows, form.blocks) if form.bits == 8 or kind != ir.DataType.UINT8 else None
    return build.store(f"{form.name}.zero", unsigned_bytes(whole, form.bits), kind, shape)


def unsigned_bytes(codes: Expr, bits: int) -> Expr:
    """Signed ``codes`` [rows, n] of ``bits`` bits as uint8 [rows, ceil(n bits / 8)], offset to be unsigned, the first
    in the lowest bits."""
    share = 8 // bits
    lifted = cast(codes, torch.int32)
    lifted = add(lifted, full(lifted.shape, 1 << (bits - 1), torch.int32))
    missing = -lifted.shape[-1] % share
    lifted = pad(lifted, -1, 0, missing) if missing else lifted
    width = lifted.shape[-1]
    parts = [index(lifted, -1, range(place, width, share)) for place in range(share)]
    total = parts[0]
    for place, part in enumerate(parts[1:], 1):
        total = add(total, mul(part, full(part.shape, 1 << (place * bits), torch.int32)))
    return cast(total, torch.uint8)


def _dequantised(build: Builder, form: Packed) -> ir.Value:
    """The dense matrix, made when the model is loaded or run: standard operations know codes of 4 and 8 bits."""
    if form.bits == 2:
        form = Packed(form.name, form.rows, form.width, 4, form.block, form.codes, form.scale, form.zero)
    kind = ir.DataType.UINT4 if form.bits == 4 else ir.DataType.UINT8
    codes = _codes(build, form, (form.rows, form.width), kind)
    zero = form.zero or full((form.rows, form.blocks), 0, torch.int8)
    zeros = _zeros(build, form, zero, kind)
    scale = build.store(f"{form.name}.scale", form.scale)
    return build.op("DequantizeLinear", codes, scale, zeros, axis=1, block_size=form.block)


def joined(params: Sequence[Param]) -> Expr | None:
    """Quantised matrices of one scheme and width on top of one another; None when they are not alike."""
    exprs = [param.expr for param in params]
    if any(expr.op != "dequantize" for expr in exprs) or len({(e.attrs, len(e.args), e.dtype) for e in exprs}) > 1:
        return None
    columns = zip(*(expr.args for expr in exprs), strict=True)
    return apply("dequantize", [concat(list(column), 0) for column in columns], dict(exprs[0].attrs))
