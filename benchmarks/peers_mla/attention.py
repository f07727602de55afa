"""Attention taken apart where the published methods change it, and what they measure on calibration text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Widths of a model's attention: ``groups`` key/value heads serve ``heads`` query heads of ``head_dim``."""

    hidden: int
    heads: int
    groups: int
    head_dim: int

    @property
    def kv(self) -> int:
        """Width of all keys of a token."""
        return self.groups * self.head_dim

    @property
    def share(self) -> int:
        """Query heads of a key/value head."""
        return self.heads // self.groups


@dataclass(frozen=True)
class Size:
    """Of one layer: values cached per token, and parameters of its linear maps in attention."""

    cache: int
    parameters: int


@dataclass(frozen=True)
class States:
    """What one attention computed before rotating, for one batch of windows.

    ``keys`` and ``values`` [batch, tokens, kv] come out of their projections. ``queries`` and ``normed``
    [batch, heads or groups, tokens, head_dim] are queries and keys as they would be rotated, after any norm.
    """

    keys: Tensor
    values: Tensor
    queries: Tensor
    normed: Tensor


class Attention(nn.Module):
    """The attention of ``source``, a transformers module with rotary positions, in replaceable steps.

    It computes the same function. Subclasses override ``compress``, which changes keys and values as projected, or
    ``rotate``, which gives what attention is computed from. It keeps no cache.
    """

    def __init__(self, source: Any, shape: Shape) -> None:
        super().__init__()
        if getattr(source, "attn_logit_softcapping", None) is not None:
            raise ValueError("attention with soft-capped logits is not covered")
        self.source = source
        self.shape = shape
        self.see: Callable[[States], None] | None = None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        source = self.source
        keys, values = source.k_proj(hidden_states), source.v_proj(hidden_states)
        queries = self._normed("q_norm", self._heads(source.q_proj(hidden_states)))
        if self.see is not None:
            self.see(States(keys, values, queries, self._normed("k_norm", self._heads(keys))))
        keys, values = self.compress(keys, values)
        normed = self._normed("k_norm", self._heads(keys))
        queries, rotated, values = self.rotate(queries, normed, self._heads(values), *position_embeddings)
        output = functional.scaled_dot_product_attention(
            queries,
            rotated,
            values,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=source.scaling,
            enable_gqa=True,
        )
        return source.o_proj(output.transpose(1, 2).flatten(2)), None

    def compress(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, tokens, kv] as projected, and as the cache gives them back."""
        return keys, values

    def rotate(
        self, queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys with their positions, [batch, heads or groups, tokens, any width], and the values."""
        cos, sin = half(cos)[:, None], half(sin)[:, None]
        return turned(queries, cos, sin), turned(keys, cos, sin), values

    def _heads(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (-1, self.shape.head_dim)).transpose(1, 2)

    def _normed(self, name: str, heads: Tensor) -> Tensor:
        norm = getattr(self.source, name, None)
        return heads if norm is None else norm(heads)


def half(table: Tensor) -> Tensor:
    """Cosines or sines [..., head_dim] hold every frequency twice: the first half, [..., head_dim / 2]."""
    return table[..., : table.shape[-1] // 2]


def turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``heads`` [..., width], whose pair l are components l and l + width / 2, by tables [..., width / 2]."""
    real, imaginary = heads.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)


def shape_of(model: Any) -> Shape:
    """The widths of ``model``, the same in all its layers."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(config.hidden_size, heads, groups, head_dim)


def layers_of(model: Any) -> Sequence[Any]:
    return model.base_model.layers


def attentions(model: Any) -> list[Attention]:
    return [layer.self_attn for layer in layers_of(model)]


def open_up(model: Any) -> Shape:
    """Put an ``Attention`` that computes the same in the place of each of the model's."""
    shape = shape_of(model)
    for layer in layers_of(model):
        layer.self_attn = Attention(layer.self_attn, shape)
    return shape


def batches(windows: Tensor) -> Iterator[Tensor]:
    """Windows [count, tokens] one by one, so that peak memory does not grow with their count."""
    yield from windows.split(1)


@torch.inference_mode()
def observe(model: Any, windows: Tensor, see: Callable[[int, States], None]) -> None:
    """Run ``windows`` through the decoder; ``see`` gets each layer's index and states."""
    for index, attention in enumerate(attentions(model)):
        attention.see = lambda states, index=index: see(index, states)
    for window in batches(windows):
        model.base_model(input_ids=window, use_cache=False)
    for attention in attentions(model):
        attention.see = None


@torch.inference_mode()
def mean_loss(model: Any, windows: Tensor) -> float:
    """Nats per token of ``windows``, the first token of each left out."""
    losses = [
        functional.cross_entropy(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), ids[0, 1:]).item()
        for ids in batches(windows)
    ]
    return math.fsum(losses) / len(losses)


def moment(rows: Tensor) -> Tensor:
    """Sum of x xᵀ over the vectors of ``rows`` [..., width], float64."""
    flat = rows.reshape(-1, rows.shape[-1])
    return (flat.T @ flat).double()


def leading(moment: Tensor, count: int) -> Tensor:
    """The ``count`` eigenvectors of a symmetric matrix with the largest eigenvalues, as columns, largest first."""
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, :count]
