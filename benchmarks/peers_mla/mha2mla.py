"""MHA2MLA (Ji et al., 2025) before its training: rotary positions on few pairs of each head, joint SVD of weights.

The pairs that keep their positions are those with the largest product of the norms of queries and keys ("2-norm"), per
key/value head, with their own frequencies. The weights of the other key components and of the values share one
truncated SVD, for which no data is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers_mla.attention import (
    Attention,
    Shape,
    Size,
    States,
    half,
    layers_of,
    leading,
    mean_loss,
    observe,
    open_up,
    shape_of,
    turned,
)

TRIAL_WINDOWS = 8


class PartialAttention(Attention):
    """Positions on the pairs in ``kept`` bool [groups, head_dim / 2]; the other keys and the values from a latent.

    ``back`` [2 kv, 2 kv] maps keys and values as projected to what is left of them.
    """

    kept: Tensor
    back: Tensor

    def __init__(self, source: Any, shape: Shape, kept: Tensor, rank: int) -> None:
        super().__init__(source, shape)
        self.register_buffer("kept", kept)
        cached = torch.cat([torch.cat([kept, kept], dim=-1).flatten(), torch.zeros(shape.kv, dtype=torch.bool)])
        weight = torch.cat([source.k_proj.weight, source.v_proj.weight]).detach().double()[~cached]
        vectors = leading(weight @ weight.T, rank)
        back = torch.eye(2 * shape.kv, dtype=torch.float64)
        rows = (~cached).nonzero()[:, 0]
        back[rows[:, None], rows] = vectors @ vectors.T
        self.register_buffer("back", back.float())

    def compress(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = (torch.cat([keys, values], dim=-1) @ self.back).chunk(2, dim=-1)
        return keys, values

    def rotate(
        self, queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kept = self.kept[:, None]
        cos, sin = half(cos)[:, None].where(kept, 1.0), half(sin)[:, None].where(kept, 0.0)
        share = self.shape.share
        queries = turned(queries, cos.repeat_interleave(share, dim=1), sin.repeat_interleave(share, dim=1))
        return queries, turned(keys, cos, sin), values


def size(shape: Shape, rank: int, rope_dim: int) -> Size:
    """Every key/value head caches ``rope_dim`` rotated components, all together a latent of ``rank``."""
    rotated = shape.groups * rope_dim
    queries_and_output = 2 * shape.heads * shape.head_dim * shape.hidden
    latent = (rotated + rank) * shape.hidden + rank * (2 * shape.kv - rotated)
    return Size(rank + rotated, queries_and_output + latent)


def split(shape: Shape, cache: int) -> tuple[int, int]:
    """Rank and rope_dim for ``cache`` values: the published default keeps an eighth of each head rotated."""
    rope_dim = shape.head_dim // 8
    return cache - shape.groups * rope_dim, rope_dim


def split_best(shape: Shape, cache: int) -> tuple[int, int]:
    """All of ``cache`` as the rank: ``apply_best`` splits it."""
    return cache, 0


def size_best(shape: Shape, rank: int, rope_dim: int) -> Size:
    """As ``size`` at the published split; the parameters differ little between splits."""
    return size(shape, *split(shape, rank))


def convert(model: Any, windows: Tensor, rank: int, rope_dim: int, seed: int = 0) -> Any:
    """Convert ``model`` in place, calibrated on ``windows`` [count, tokens]. Nothing in it is random."""
    apply(model, calibrate(model, windows, rope_dim), rank, rope_dim)
    return model


@dataclass(frozen=True)
class Calibrated:
    """Scores of the pairs per layer, [groups, head_dim / 2], and the windows to try splits on."""

    scores: list[Tensor]
    trial: Tensor


def calibrate(model: Any, windows: Tensor, rope_dim: int) -> Calibrated:
    return Calibrated(pair_scores(model, open_up(model), windows), windows[:TRIAL_WINDOWS])


def apply(model: Any, calibrated: Calibrated, rank: int, rope_dim: int) -> None:
    """Positions on ``rope_dim`` components of each key/value head, all else through ``rank``."""
    shape = shape_of(model)
    for layer, score in zip(layers_of(model), calibrated.scores, strict=True):
        kept = torch.zeros_like(score, dtype=torch.bool).scatter(1, score.topk(rope_dim // 2).indices, True)
        layer.self_attn = PartialAttention(layer.self_attn.source, shape, kept, rank)


def apply_best(model: Any, calibrated: Calibrated, rank: int, rope_dim: int) -> None:
    """``apply`` for ``rank`` cached values in all, with the rope_dim of least loss on a few of the windows.

    ``rope_dim`` is ignored: 2, 4, 8, … up to half the head width are tried.
    """
    shape = shape_of(model)
    losses: dict[int, float] = {}
    tried = 2
    while tried <= shape.head_dim // 2 and shape.groups * tried < rank:
        apply(model, calibrated, rank - shape.groups * tried, tried)
        losses[tried] = mean_loss(model, calibrated.trial)
        tried *= 2
    best = min(losses, key=losses.__getitem__)
    apply(model, calibrated, rank - shape.groups * best, best)


def pair_scores(model: Any, shape: Shape, windows: Tensor) -> list[Tensor]:
    """Per layer [groups, head_dim / 2]: mean norm of the keys' pair times that of the queries', summed over queries."""
    keys = [torch.zeros(shape.groups, shape.head_dim // 2) for _ in layers_of(model)]
    queries = [torch.zeros(shape.heads, shape.head_dim // 2) for _ in layers_of(model)]

    def see(index: int, states: States) -> None:
        keys[index] += _pair_norms(states.normed)
        queries[index] += _pair_norms(states.queries)

    observe(model, windows, see)
    return [k * q.unflatten(0, (shape.groups, -1)).sum(1) for k, q in zip(keys, queries, strict=True)]


def _pair_norms(heads: Tensor) -> Tensor:
    """Norms of the pairs of [batch, heads, tokens, head_dim], summed over tokens: [heads, head_dim / 2]."""
    return torch.stack(heads.chunk(2, dim=-1)).norm(dim=0).sum(dim=(0, 2))
