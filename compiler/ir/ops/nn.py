"""Whole operations of transformers: linear maps, norms, heads, rotary embedding.

Shapes in the docs: B batch, T tokens, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compiler.ir.opdef import Attr, OpDef, Types
from compiler.ir.ops import axes as rules
from compiler.ir.ops.elementwise import broadcast, need
from compiler.ir.types import Dim, TensorType, canonical_dim, dim_product


def same_dim(left: Dim, right: Dim, what: str) -> None:
    if left != right:
        raise ValueError(f"{what} differ: {left} and {right}")


# --- linear maps ---------------------------------------------------------------------------------------------


def _infer_linear(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, weight, bias = need(types[0]), need(types[1]), types[2]
    same_dim(x.shape[-1], weight.shape[1], "input widths")
    if bias is not None:
        same_dim(bias.shape[0], weight.shape[0], "output widths")
    return [x.with_shape((*x.shape[:-1], weight.shape[0]))]


def _eval_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In x's dtype; a weight of another is multiplied in its own."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight, bias)
    product = F.linear(x.to(weight.dtype), weight).to(x.dtype)
    return product if bias is None else product + bias


def _infer_embedding(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    table, ids = need(types[0]), need(types[1])
    return [table.with_shape((*ids.shape, *table.shape[1:]))]


def _eval_embedding(table: Tensor, ids: Tensor) -> Tensor:
    return F.embedding(ids, table)


def _infer_matmul(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, y = need(types[0]), need(types[1])
    same_dim(x.shape[-1], y.shape[-2], "inner sizes")
    return [x.with_shape((*broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]))]


def _infer_conv(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, weight = need(types[0]), need(types[1])
    if x.rank != weight.rank or len(attrs["stride"]) != x.rank - 2:
        raise ValueError(f"{x} and a kernel {weight} differ in rank")
    windows = zip(x.shape[2:], weight.shape[2:], attrs["stride"], attrs["padding"], attrs["dilation"], strict=True)
    return [x.with_shape((x.shape[0], weight.shape[0], *(_conv_size(*window) for window in windows)))]


def _conv_size(size: Dim, kernel: Dim, stride: int, padding: int, dilation: int) -> Dim:
    if not isinstance(kernel, int):
        raise ValueError(f"a kernel of symbolic size {kernel}")
    return canonical_dim(f"floor(({size} + {2 * padding - dilation * (kernel - 1) - 1})/{stride}) + 1")


def _eval_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    function = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
    return function(x, weight, bias, stride, padding, dilation, groups)


def _fit_conv(operands: Types, results: Types, attrs: Mapping[str, Any]) -> dict[str, Any]:
    channels, width = need(operands[0]).shape[1], need(operands[1]).shape[1]
    return {"groups": int(channels) // int(width)} if attrs["groups"] > 1 else {}


# --- norms ---------------------------------------------------------------------------------------------------


def _infer_norm(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x = need(types[0])
    for vector in types[1:]:
        if vector is not None:
            same_dim(vector.shape[-1], x.shape[-1], "norm widths")
    return [x]


def _eval_rms_norm(x: Tensor, weight: Tensor | None, *, eps: float, offset: float) -> Tensor:
    # The order of these steps is that of transformers' modules, so that results agree to the last bit.
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed
    return weight * normed if offset == 0.0 else normed * (offset + weight)


def _eval_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# --- heads ---------------------------------------------------------------------------------------------------


def _infer_split_heads(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, heads = need(types[0]), attrs["heads"]
    batch, tokens, width = x.shape
    if not isinstance(width, int) or width % heads:
        raise ValueError(f"width {width} does not split into {heads} heads")
    return [x.with_shape((batch, heads, tokens, width // heads))]


def _eval_split_heads(x: Tensor, *, heads: int) -> Tensor:
    batch, tokens, width = x.shape
    return x.view(batch, tokens, heads, width // heads).transpose(1, 2)


def _fit_heads(operands: Types, results: Types, attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {"heads": need(results[0]).shape[1]}


def _infer_merge_heads(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x = need(types[0])
    batch, tokens, heads, width = x.shape
    return [x.with_shape((batch, tokens, dim_product((heads, width))))]


def _eval_merge_heads(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:2], -1)


# --- rotary position embedding -------------------------------------------------------------------------------


def _infer_rope_table(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    positions, frequencies = need(types[0]), need(types[1])
    table = frequencies.with_shape((*positions.shape, *frequencies.shape))
    return [table, table]


def _eval_rope_table(positions: Tensor, frequencies: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    angles = positions[..., None].to(frequencies.dtype) * frequencies
    return angles.cos() * scale, angles.sin() * scale


def _infer_rope(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, cos = need(types[0]), need(types[1])
    pairs, width = cos.shape[-1], x.shape[-1]
    if not isinstance(pairs, int) or not isinstance(width, int) or 2 * pairs > width:
        raise ValueError(f"{pairs} rotary pairs do not fit a head of {width}")
    return [x]


def _eval_rope(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str) -> Tensor:
    rotary = 2 * cos.shape[-1]
    turned, passed = x[..., :rotary], x[..., rotary:]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if layout == "half":
        first, second = turned.chunk(2, -1)
    else:
        first, second = turned[..., 0::2], turned[..., 1::2]
    real, imaginary = first * cos - second * sin, second * cos + first * sin
    if layout == "interleaved":
        result = torch.stack((real, imaginary), -1).flatten(-2)
    else:
        result = torch.cat((real, imaginary), -1)
    return torch.cat((result, passed), -1) if passed.shape[-1] else result


OPS = (
    OpDef(
        "linear",
        "x weight bias?",
        _infer_linear,
        _eval_linear,
        axes="... i, o i, o? -> ... o",
        doc="x @ weight.T + bias. weight [out, in].",
    ),
    OpDef(
        "embedding",
        "table ids",
        _infer_embedding,
        _eval_embedding,
        axes="v~ d, ... -> ... d",
        doc="Rows of table [V, D] at ids.",
    ),
    OpDef(
        "matmul",
        "x y",
        _infer_matmul,
        torch.matmul,
        axes="... i k, ... k j -> ... i j",
        doc="Matrix product over the last two axes, leading axes broadcast.",
    ),
    OpDef(
        "conv",
        "x weight bias?",
        _infer_conv,
        _eval_conv,
        {"stride": Attr("ints"), "padding": Attr("ints"), "dilation": Attr("ints"), "groups": Attr("int", 1)},
        axes=rules.convolved,
        fit=_fit_conv,
        doc="Convolution of x [B, C, ...] with weight [O, C/groups, ...], over one to three axes.",
    ),
    OpDef(
        "rms_norm",
        "x weight?",
        _infer_norm,
        _eval_rms_norm,
        {"eps": Attr("float"), "offset": Attr("float", 0.0)},
        axes="... d%, d? -> ... d",
        doc="x / sqrt(mean(x^2) + eps) * (offset + weight), over the last axis.",
    ),
    OpDef(
        "layer_norm",
        "x weight? bias?",
        _infer_norm,
        _eval_layer_norm,
        {"eps": Attr("float")},
        axes="... d%, d?, d? -> ... d",
        doc="(x - mean) / sqrt(var + eps) * weight + bias, over the last axis.",
    ),
    OpDef(
        "split_heads",
        "x",
        _infer_split_heads,
        _eval_split_heads,
        {"heads": Attr("int")},
        axes="b t (h d) -> b h t d",
        fit=_fit_heads,
        doc="[B, T, H*d] to [B, H, T, d].",
    ),
    OpDef(
        "merge_heads",
        "x",
        _infer_merge_heads,
        _eval_merge_heads,
        axes="b t h d -> b t (h d)",
        doc="[B, T, H, d] (as attention yields it) to [B, T, H*d].",
    ),
    OpDef(
        "rope_table",
        "positions frequencies",
        _infer_rope_table,
        _eval_rope_table,
        {"scale": Attr("float", 1.0)},
        axes="b t, p -> b t p, b t p",
        doc="cos and sin of position * frequency, times scale: [B, T, pairs] each.",
    ),
    OpDef(
        "rope",
        "x cos sin",
        _infer_rope,
        _eval_rope,
        {"layout": Attr("text", "half", ("half", "interleaved", "interleaved-to-half"))},
        axes="b h t d!, b t p!, b t p! -> b h t d",
        doc="Rotate pairs of the first 2*pairs dims of x [B, H, T, d]; the rest passes. `half` pairs (i, i+pairs), "
        "`interleaved` pairs (2i, 2i+1), `interleaved-to-half` reads pairs (2i, 2i+1) and writes (i, i+pairs).",
    ),
)
