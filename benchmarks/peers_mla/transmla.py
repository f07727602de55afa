"""TransMLA (Meng et al., 2025): rotate keys, keep rotary positions on one head, joint PCA of the rest with the values.

``rope_dim`` of the rotated components keep positions; head_dim / rope_dim = c frequencies stand behind each. Frequency
folding f merges f neighbouring frequencies into one rotation; f = c, 2c, 4c, … are tried for as long as the loss on a
part of the calibration windows falls (the published tool tries them on the test set). The published tool holds the
queries, keys and values of all layers in memory; sums of their products are enough, so this one needs far less.
"""

from __future__ import annotations

import math
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
    moment,
    observe,
    open_up,
    shape_of,
    turned,
)

DAMPING = 0.01  # share of the mean eigenvalue added to every eigenvalue
TRIAL_WINDOWS = 16
BALANCE = 1.0


class LatentAttention(Attention):
    """Positions on the first ``rope_dim`` of the rotated components; the others, and the values, through a latent.

    ``basis`` [kv, kv] has the components as columns: real parts of those with positions, their imaginary parts, and the
    rest. ``back`` [2 kv, 2 kv] maps keys and values to what the latent gives back of the keys without positions, in
    the heads' own basis, and of the values.
    """

    basis: Tensor
    back: Tensor

    def __init__(self, source: Any, shape: Shape, basis: Tensor, rope_dim: int) -> None:
        super().__init__(source, shape)
        self.rope_dim = rope_dim
        self.register_buffer("basis", basis.float())
        rest = basis[:, rope_dim:]
        exact = torch.block_diag(rest @ rest.T, torch.eye(shape.kv, dtype=basis.dtype))
        self.register_buffer("back", exact.float())

    def rotate(
        self, queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        step = self.shape.head_dim // self.rope_dim
        cos, sin = half(cos)[:, None, :, ::step], half(sin)[:, None, :, ::step]
        kept = self.basis[:, : self.rope_dim]
        flat = _flat(keys)
        shared = turned((flat @ kept)[:, None], cos, sin).expand(-1, self.shape.groups, -1, -1)
        blocks = kept.unflatten(0, (self.shape.groups, -1)).repeat_interleave(self.shape.share, dim=0)
        positional = turned(queries @ blocks, cos, sin)
        given = torch.cat([flat, _flat(values)], dim=-1) @ self.back
        keys, values = (self._heads(part) for part in given.chunk(2, dim=-1))
        return torch.cat([positional, queries], dim=-1), torch.cat([shared, keys], dim=-1), values


def size(shape: Shape, rank: int, rope_dim: int) -> Size:
    """The latent and one rotated key are cached; queries get a second part for it."""
    queries = shape.heads * (shape.head_dim + rope_dim) * shape.hidden
    latent = (rank + rope_dim) * shape.hidden + shape.heads * 2 * shape.head_dim * rank
    return Size(rank + rope_dim, queries + latent + shape.hidden * shape.heads * shape.head_dim)


def split(shape: Shape, cache: int) -> tuple[int, int]:
    """Rank and rope_dim for ``cache`` values: the published default keeps 64 rotated."""
    rope_dim = min(64, shape.head_dim)
    return cache - rope_dim, rope_dim


def convert(model: Any, windows: Tensor, rank: int, rope_dim: int, seed: int = 0) -> Any:
    """Convert ``model`` in place, calibrated on ``windows`` [count, tokens]. Nothing in it is random."""
    apply(model, calibrate(model, windows, rope_dim), rank, rope_dim)
    return model


def calibrate(model: Any, windows: Tensor, rope_dim: int) -> list[Tensor]:
    """Take the first step, and then what the second needs: moments of keys and values in the model so changed."""
    keep_positions(model, windows, rope_dim)
    return joint_moments(model, windows)


def keep_positions(model: Any, windows: Tensor, rope_dim: int) -> int:
    """The first step alone: positions on ``rope_dim`` components, nothing truncated. Returns the folding chosen."""
    shape = open_up(model)
    if shape.head_dim % rope_dim:
        raise ValueError(f"rope_dim {rope_dim} does not divide the head width {shape.head_dim}")
    moments = key_moments(model, windows)
    collapse, trial = shape.head_dim // rope_dim, windows[:TRIAL_WINDOWS]
    best, least = 0, math.inf
    fold = collapse
    while (shape.head_dim // 2) % fold == 0:
        set_bases(model, moments, fold, rope_dim)
        loss = mean_loss(model, trial)
        if loss >= least:
            break
        best, least, fold = fold, loss, 2 * fold
    set_bases(model, moments, best, rope_dim)
    return best


def key_moments(model: Any, windows: Tensor) -> list[Tensor]:
    """E[k kᵀ] of every layer, not divided by the count: [kv, kv]."""
    moments = [torch.zeros((shape_of(model).kv,) * 2, dtype=torch.float64) for _ in layers_of(model)]

    def see(index: int, states: States) -> None:
        moments[index] += moment(_flat(states.normed))

    observe(model, windows, see)
    return moments


def set_bases(model: Any, moments: list[Tensor], fold: int, rope_dim: int) -> None:
    shape = shape_of(model)
    for layer, keys in zip(layers_of(model), moments, strict=True):
        basis = rotation(keys, shape, fold, rope_dim)
        layer.self_attn = LatentAttention(layer.self_attn.source, shape, basis, rope_dim)


def rotation(keys: Tensor, shape: Shape, fold: int, rope_dim: int) -> Tensor:
    """The orthogonal basis of one layer, columns as ``LatentAttention`` wants them, from the keys' moment [kv, kv].

    A bucket holds ``fold`` neighbouring frequencies of every head. Its real and its imaginary parts are rotated by
    the same matrix, so that for fold 1 the rotation commutes with that of the positions.
    """
    pairs = shape.head_dim // 2
    index = torch.arange(shape.kv).view(shape.groups, 2, pairs // fold, fold)
    real, imaginary = (index[:, part].transpose(0, 1).flatten(1) for part in (0, 1))
    kept = fold * rope_dim // shape.head_dim
    first, rest = ([], []), []
    for re, im in zip(real, imaginary, strict=True):
        energy = keys[re][:, re] + keys[im][:, im]
        energy += DAMPING * energy.diagonal().mean() * torch.eye(len(re), dtype=energy.dtype)
        vectors = leading(energy, len(re))
        columns = [_placed(vectors, rows, shape.kv) for rows in (re, im)]
        for part, column in zip(first, columns, strict=True):
            part.append(column[:, :kept])
        rest += [column[:, kept:] for column in columns]
    return torch.cat([*first[0], *first[1], *rest], dim=1)


def _placed(vectors: Tensor, rows: Tensor, height: int) -> Tensor:
    placed = vectors.new_zeros(height, vectors.shape[1])
    placed[rows] = vectors
    return placed


def joint_moments(model: Any, windows: Tensor) -> list[Tensor]:
    """E[x xᵀ] of keys beside values in every layer, not divided by the count: [2 kv, 2 kv]."""
    shape = shape_of(model)
    moments = [torch.zeros((2 * shape.kv,) * 2, dtype=torch.float64) for _ in layers_of(model)]

    def see(index: int, states: States) -> None:
        moments[index] += moment(torch.cat([_flat(states.normed), states.values], dim=-1))

    observe(model, windows, see)
    return moments


def apply(model: Any, moments: list[Tensor], rank: int, rope_dim: int) -> None:
    """The second step: keys without positions, scaled to the values' size, and values through ``rank`` components."""
    for layer, joint in zip(layers_of(model), moments, strict=True):
        attention: LatentAttention = layer.self_attn
        attention.back.copy_(projector(joint, attention.basis.double(), rope_dim, rank))


def projector(joint: Tensor, basis: Tensor, rope_dim: int, rank: int) -> Tensor:
    """The map from keys and values to what is left of them, [2 kv, 2 kv], from their moment of that shape."""
    down, back = pair(joint, basis, rope_dim, rank)
    return (back @ down).T


def pair(joint: Tensor, basis: Tensor, rope_dim: int, rank: int) -> tuple[Tensor, Tensor]:
    """The map to the latent [rank, 2 kv], and back to keys and values [2 kv, rank]."""
    width = len(basis)
    into = torch.block_diag(basis[:, rope_dim:], torch.eye(width, dtype=basis.dtype))
    norms = (into.T @ joint @ into).diagonal().sqrt()
    # The values' norm leaves their first rope_dim columns out, as the published tool does.
    ratio = norms[: width - rope_dim].mean() / (norms[width:].mean() * BALANCE)
    scale = torch.ones_like(norms)
    scale[: width - rope_dim] /= ratio
    into, out = into * scale, (into / scale).T
    energy = into.T @ joint @ into
    energy += DAMPING * energy.diagonal().mean() * torch.eye(len(energy), dtype=energy.dtype)
    vectors = leading(energy, rank)
    return (into @ vectors).T, (vectors.T @ out).T


def _flat(heads: Tensor) -> Tensor:
    """[batch, heads, tokens, width] to [batch, tokens, heads * width]."""
    return heads.transpose(1, 2).flatten(2)
