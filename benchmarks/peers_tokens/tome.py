"""Token merging (ToMe, arXiv 2210.09461) on DINOv2, as the paper describes it.

Behind the attention of every layer, tokens at even and odd places are two sets. Each of the first is matched with the
one of the second whose key, the mean over heads, is nearest by cosine; the class token, the first of all, stays. The r
best matches are merged, means being weighed by how many patches each token stands for; what remains of the first set
goes before the second. Attention adds the logarithm of these numbers to its scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def tome(model: Any, merged: int) -> Callable[[Tensor], Tensor]:
    """The class token's features [B, D] of a Dinov2Model that merges so many tokens in every layer."""

    def features(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            x, sizes = model.embeddings(pixels), None
            for layer in model.encoder.layer:
                x, sizes = _layer(layer, x, sizes, merged)
            return model.layernorm(x)[:, 0]

    return features


def _layer(layer: Any, x: Tensor, sizes: Tensor | None, merged: int) -> tuple[Tensor, Tensor]:
    attended, metric = _attention(layer.attention, layer.norm1(x), sizes)
    x = x + layer.layer_scale1(attended)
    sizes = torch.ones(*x.shape[:2], 1) if sizes is None else sizes
    x, sizes = _merged(x, sizes, metric, merged)
    return x + layer.layer_scale2(layer.mlp(layer.norm2(x))), sizes


def _attention(own: Any, x: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
    heads = own.q_proj.out_features // own.head_dim
    query, key, value = (each(x).unflatten(-1, (heads, -1)).transpose(1, 2) for each in _maps(own))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if sizes is not None:
        scores = scores + sizes.log()[:, None, None, :, 0]
    mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    return own.o_proj(mixed), key.mean(1)


def _maps(own: Any) -> tuple[Any, Any, Any]:
    return own.q_proj, own.k_proj, own.v_proj


def _merged(x: Tensor, sizes: Tensor, metric: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    merged = min(merged, (x.shape[1] - 1) // 2)
    if merged <= 0:
        return x, sizes
    unit = F.normalize(metric, dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    source, remain = order[:, :merged], order[:, merged:].sort(-1).values
    target = partner.gather(1, source)

    def joined(values: Tensor) -> Tensor:
        width = values.shape[-1]
        first, second = values[:, ::2], values[:, 1::2]
        moved = first.gather(1, source[..., None].expand(-1, -1, width))
        second = second.scatter_add(1, target[..., None].expand(-1, -1, width), moved)
        return torch.cat((first.gather(1, remain[..., None].expand(-1, -1, width)), second), 1)

    total = joined(sizes)
    return joined(x * sizes) / total, total
