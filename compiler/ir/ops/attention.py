"""Attention, over keys and values or over latents.

Shapes in the docs: B batch, T tokens, S keys, H heads, G key/value heads, d head width, v value width, r latent rank,
R rotary width, n unrotated width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compiler.ir.opdef import Attr, OpDef, Types
from compiler.ir.ops.elementwise import need
from compiler.ir.ops.nn import same_dim
from compiler.ir.types import TensorType


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


OPS = (
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
)
