"""Whitened low rank of keys and of values with rotary positions kept (Palu, SVD-LLM; Chang et al., Wang et al., 2024).

Keys are cached before their rotation and rebuilt at every step, so that decoding cannot happen in the latent space.
All heads form one group, keys and values get equal ranks. The best map of a rank for the outputs on the calibration
data projects on the leading eigenvectors of the outputs' second moment, which is what whitening by a Cholesky factor
of the inputs' moment arrives at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers_mla.attention import (
    Attention,
    Shape,
    Size,
    States,
    layers_of,
    leading,
    moment,
    observe,
    open_up,
    shape_of,
)


class LowRankAttention(Attention):
    """Keys and values as projected, each on the columns of a basis [kv, rank]."""

    key_basis: Tensor
    value_basis: Tensor

    def __init__(self, source: Any, shape: Shape, key_basis: Tensor, value_basis: Tensor) -> None:
        super().__init__(source, shape)
        self.register_buffer("key_basis", key_basis.float())
        self.register_buffer("value_basis", value_basis.float())

    def compress(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys @ self.key_basis @ self.key_basis.T, values @ self.value_basis @ self.value_basis.T


def size(shape: Shape, rank: int, rope_dim: int) -> Size:
    """A latent of ``rank`` for the keys, one for the values."""
    queries_and_output = 2 * shape.heads * shape.head_dim * shape.hidden
    return Size(2 * rank, queries_and_output + 2 * rank * (shape.hidden + shape.kv))


def split(shape: Shape, cache: int) -> tuple[int, int]:
    """Half of ``cache`` for keys, half for values; all positions stay."""
    return cache // 2, shape.head_dim


def convert(model: Any, windows: Tensor, rank: int, rope_dim: int, seed: int = 0) -> Any:
    """Convert ``model`` in place, calibrated on ``windows`` [count, tokens]. Nothing in it is random."""
    apply(model, calibrate(model, windows, rope_dim), rank, rope_dim)
    return model


def calibrate(model: Any, windows: Tensor, rope_dim: int) -> Tensor:
    """Second moments of keys and of values as projected, of every layer: [2, layers, kv, kv]."""
    shape = open_up(model)
    moments = torch.zeros(2, len(layers_of(model)), shape.kv, shape.kv, dtype=torch.float64)

    def see(index: int, states: States) -> None:
        moments[0, index] += moment(states.keys)
        moments[1, index] += moment(states.values)

    observe(model, windows, see)
    return moments


def apply(model: Any, moments: Tensor, rank: int, rope_dim: int) -> None:
    """Keys and values through ``rank`` components each."""
    shape = shape_of(model)
    for layer, keys, values in zip(layers_of(model), *moments, strict=True):
        source = layer.self_attn.source
        layer.self_attn = LowRankAttention(source, shape, leading(keys, rank), leading(values, rank))
