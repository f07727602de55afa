"""Attention and experts as opaque operations of the traced program.

transformers lets anyone register an attention, mask or experts implementation under a name. Ours are torch custom
operations that carry what a whole attention means (scale, causality, window, soft cap, sinks) and have no kernel:
they are only ever traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from compiler.errors import CaptureError

NAME = "compress_model"

# Keywords that transformers passes to every attention function and that say nothing about what is computed here.
_IRRELEVANT = frozenset({"position_ids", "cache_position"})

# What masks may be composed of. Packing is derived from position ids and never applies to a batch of whole sequences.
_UNDERSTOOD_MASKS = frozenset(
    {
        "and_masks",
        "causal_mask_function",
        "bidirectional_mask_function",
        "sliding_window_overlay",
        "sliding_window_bidirectional_overlay",
        "packed_sequence_mask_function",
        "remap_positions_for_packed_sequence",
    }
)


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


@torch.library.custom_op("compress_model::masking", mutates_args=())
def masking(mask: Tensor | None, window: int, causal: bool) -> Tensor:
    """A padding mask [B, S], or one element for none, that carries what else the attentions do that it is handed to.

    Only an attention of ours can read it: a model that adds it to scores of its own is refused, not captured without.
    """
    raise NotImplementedError("masks are only traced")


@masking.register_fake
def _masking_shape(mask: Tensor | None, window: int, causal: bool) -> Tensor:
    return torch.empty((1, 1), dtype=torch.bool) if mask is None else torch.empty_like(mask)


@torch.library.custom_op("compress_model::passed", mutates_args=())
def passed(x: Tensor, layer: int) -> Tensor:
    """``x`` as the result of a layer that is not traced."""
    raise NotImplementedError("layers are only passed through while tracing")


@passed.register_fake
def _passed_shape(x: Tensor, layer: int) -> Tensor:
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
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if causal is None:
        raise CaptureError(f"attention of `{type(module).__name__}` does not say whether it is causal")
    scale = float(scaling) if scaling is not None else float(query.shape[-1]) ** -0.5
    window = int(sliding_window or 0)
    result = attention(
        query, key, value, attention_mask, position_bias, s_aux, scale, bool(causal), window, float(softcap or 0.0)
    )
    return result, None


def _mask(
    *args: Any,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The padding mask [B, S] or None, marked where it is causal or has a window."""
    names = list(_mask_functions(mask_function))
    for name in names:
        if name not in _UNDERSTOOD_MASKS:
            raise CaptureError(f"the attention mask `{name}` is not in the graph's vocabulary")
    causal = "causal_mask_function" in names
    if not any(name.startswith("sliding_window") for name in names):
        return masking(attention_mask, 0, True) if causal else attention_mask
    if local_size is None:
        raise CaptureError("a sliding window does not say how wide it is")
    # Looking both ways, the width of a mask counts the tokens on one side, and an attention's also the token itself.
    return masking(attention_mask, local_size + ("sliding_window_bidirectional_overlay" in names), causal)


def _mask_functions(function: Any) -> Iterator[str]:
    """The functions that a mask is composed of, which transformers nests in closures."""
    for cell in getattr(function, "__closure__", None) or ():
        for part in cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,):
            if callable(part):
                yield from _mask_functions(part)
    if function is not None:
        yield function.__qualname__.partition(".")[0]


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
