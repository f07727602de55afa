"""Whole operations of transformers: linear maps, norms, rotary embedding, attention, experts.

Shapes in the docs: B batch, T tokens, S keys, D width, H heads, G key/value heads, d head width, v value width,
r latent rank, R rotary width, n unrotated width, E experts, K experts per token, N tokens flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    return F.linear(x, weight, bias)


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


# --- attention -----------------------------------------------------------------------------------------------


def _infer_attention(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    query, key, value = need(types[0]), need(types[1]), need(types[2])
    same_dim(query.shape[-1], key.shape[-1], "query and key widths")
    same_dim(key.shape[1], value.shape[1], "key and value heads")
    same_dim(key.shape[2], value.shape[2], "key and value lengths")
    heads, groups = query.shape[1], key.shape[1]
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        raise ValueError(f"{heads} query heads do not share {groups} key/value heads")
    return [query.with_shape((query.shape[0], query.shape[2], heads, value.shape[-1]))]


def attention_mask(queries: int, keys: int, causal: bool, window: int, device: torch.device) -> Tensor | None:
    """True where query i (the last ``queries`` of ``keys`` positions) may look; None when it may look anywhere."""
    if not causal and not window:
        return None
    row = torch.arange(queries, device=device)[:, None] + (keys - queries)
    column = torch.arange(keys, device=device)[None]
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        allowed &= column <= row
    if window:
        allowed &= row - column < window
        if not causal:
            allowed &= column - row < window
    return allowed


def _eval_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    if window >= key.shape[2]:
        window = 0
    plain = mask is None and bias is None and sinks is None and not window and not softcap
    if plain and (not causal or query.shape[2] == key.shape[2]):
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).contiguous()
    return _explicit_attention(query, key, value, mask, bias, sinks, scale, causal, window, softcap)


def _explicit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    share = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    allowed = attention_mask(query.shape[2], key.shape[2], causal, window, query.device)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :].bool(), torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous()


def _infer_latent_attention(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    query, latent, rotary, up = need(types[0]), need(types[1]), types[2], need(types[3])
    same_dim(latent.shape[-1], up.shape[1], "latent ranks")
    if rotary is not None:
        same_dim(latent.shape[1], rotary.shape[1], "latent and rotary key lengths")
    heads, unrotated = query.shape[1], _unrotated_width(query, rotary)
    if not isinstance(up.shape[0], int) or not isinstance(heads, int) or up.shape[0] % heads:
        raise ValueError(f"up-projection of {up.shape[0]} rows does not split into {heads} heads")
    value_width = up.shape[0] // heads - unrotated
    if value_width <= 0:
        raise ValueError(f"up-projection of {up.shape[0]} rows leaves {heads} heads no value beside their key")
    return [query.with_shape((query.shape[0], query.shape[2], heads, value_width))]


def _unrotated_width(query: TensorType, rotary: TensorType | None) -> int:
    width, rotated = query.shape[-1], 0 if rotary is None else rotary.shape[-1]
    if not isinstance(width, int) or not isinstance(rotated, int) or rotated > width:
        raise ValueError(f"queries of width {width} cannot hold a rotary part of {rotated}")
    return width - rotated


def _eval_latent_attention(
    query: Tensor,
    latent: Tensor,
    rotary: Tensor | None,
    up: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> Tensor:
    batch, heads, _, width = query.shape
    unrotated = width - (0 if rotary is None else rotary.shape[-1])
    expanded = F.linear(latent, up).view(batch, latent.shape[1], heads, -1).transpose(1, 2)
    key, value = expanded[..., :unrotated], expanded[..., unrotated:]
    if rotary is not None:
        key = torch.cat((key, rotary.unsqueeze(1).expand(-1, heads, -1, -1)), -1)
    return _eval_attention(
        query, key, value, mask, None, None, scale=scale, causal=causal, window=window, softcap=softcap
    )


# --- experts -------------------------------------------------------------------------------------------------


def _infer_experts(types: Types, attrs: Mapping[str, Any]) -> list[TensorType]:
    x, indices, weights, gate_up, down = (need(type) for type in types[:5])
    same_dim(gate_up.shape[2], x.shape[1], "input widths")
    same_dim(gate_up.shape[1], dim_product((2, down.shape[2])), "inner widths")
    same_dim(gate_up.shape[0], down.shape[0], "numbers of experts")
    if indices.shape != weights.shape or indices.shape[0] != x.shape[0]:
        raise ValueError(f"indices {indices} and weights {weights} do not fit the tokens {x}")
    return [x.with_shape((x.shape[0], down.shape[1]))]


def gate(gate_up: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    """The gated unit of an expert: [..., 2F], first the gate and then the up half, to [..., F]."""
    gate, up = gate_up.chunk(2, -1)
    if activation == "clamped_swish":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return GATES[activation](gate) * up


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": torch.relu,
}


def _eval_experts(
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    out = x.new_zeros(x.shape[0], down.shape[1])
    for expert in indices.unique().tolist():
        token, slot = torch.where(indices == expert)
        inner = F.linear(x[token], gate_up[expert], None if gate_up_bias is None else gate_up_bias[expert])
        inner = gate(inner, activation, alpha, limit)
        result = F.linear(inner, down[expert], None if down_bias is None else down_bias[expert])
        out.index_add_(0, token, result * weights[token, slot, None])
    return out


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
    OpDef(
        "attention",
        "query key value mask? bias? sinks?",
        _infer_attention,
        _eval_attention,
        {
            "scale": Attr("float"),
            "causal": Attr("bool", False),
            "window": Attr("int", 0),
            "softcap": Attr("float", 0.0),
        },
        axes="b (g s) t d, b g u d, b g u v, b u?, b (g s) t u?, (g s)? -> b t (g s) v",
        doc="softmax(scale * q k^T + bias) v. query [B, H, T, d], key [B, G, S, d], value [B, G, S, v] -> "
        "[B, T, H, v]. mask [B, S] is true where a key exists; sinks [H] are extra logits without a value; "
        "window w lets position i see (i-w, i] when causal and (i-w, i+w) otherwise; softcap c bends scores to "
        "c*tanh(s/c).",
    ),
    OpDef(
        "latent_attention",
        "query latent rotary_key? up mask?",
        _infer_latent_attention,
        _eval_latent_attention,
        {
            "scale": Attr("float"),
            "causal": Attr("bool", False),
            "window": Attr("int", 0),
            "softcap": Attr("float", 0.0),
        },
        axes="b h t q!, b u r, b u p!?, (h! m!) r, b u? -> b t h v!",
        doc="Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434). query [B, H, T, n+R], latent [B, S, r], "
        "rotary_key [B, S, R] (rotated, shared by heads; R is 0 without one), up [H*(n+v), r]: per head n key rows "
        "then v value rows -> [B, T, H, v]. window and softcap are those of `attention`. The cache holds latent and "
        "rotary_key.",
    ),
    OpDef(
        "experts",
        "x indices weights gate_up down gate_up_bias? down_bias?",
        _infer_experts,
        _eval_experts,
        {
            "activation": Attr("text", choices=(*GATES, "clamped_swish")),
            "alpha": Attr("float", 1.0),
            "limit": Attr("float", 0.0),
        },
        axes="n d, n k!, n k!, e~ (two! f) d, e~ d f, e~ (two! f)?, e~ d? -> n d",
        doc="Sum over k of weights[:, k] * expert indices[:, k] of x [N, D]. An expert is down (gate(g) * u) with "
        "g, u the halves of gate_up x: gate_up [E, 2F, D], down [E, D, F], biases [E, 2F] and [E, D]. "
        "`clamped_swish` is (clip(u, +-limit) + 1) * m * sigmoid(alpha m) with m = min(g, limit).",
    ),
)
