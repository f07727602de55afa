"""Attention and experts as opaque operations of the traced program.

transformers lets anyone register an attention, mask or experts implementation under a name. Ours are torch custom
operations that carry what a whole attention means (scale, causality, window, soft cap, sinks) and have no kernel:
they are only ever traced.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from compiler.errors import CaptureError

NAME = "compress_model"

# Keywords that transformers passes to every attention function and that say nothing about what is computed here.
_IRRELEVANT = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "dropout", "deterministic"})


@torch.library.custom_op("compress_model::attention", mutates_args=())
def attention(
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
    raise NotImplementedError("attention is only traced")


@attention.register_fake
def _attention_shape(
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
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("compress_model::experts", mutates_args=())
def experts(x: Tensor, indices: Tensor, weights: Tensor, parameters: list[Tensor]) -> Tensor:
    raise NotImplementedError("experts are only traced")


@experts.register_fake
def _experts_shape(x: Tensor, indices: Tensor, weights: Tensor, parameters: list[Tensor]) -> Tensor:
    return torch.empty_like(x)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    unknown = [name for name, value in others.items() if isinstance(value, Tensor) and name not in _IRRELEVANT]
    if unknown:
        raise CaptureError(f"attention of `{type(module).__name__}` takes `{unknown[0]}`, which is not understood")
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", False))
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    window = int(sliding_window or 0)
    result = attention(
        query, key, value, attention_mask, position_bias, s_aux, scale, causal, window, float(softcap or 0.0)
    )
    return result, None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    # Causality and window travel with the attention itself; only the padding mask [B, S] is data.
    return attention_mask


def _experts(module: nn.Module, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    return experts(x, indices, weights, list(module.parameters()))


@lru_cache(maxsize=1)
def register() -> str:
    """Make the implementations known to transformers. Returns the name to select them by."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    ExpertsInterface.register(NAME, _experts)
    return NAME
