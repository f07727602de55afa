"""The live key/value cache of a model, measured on its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compiler.errors import DataError
from compiler.evaluate.inputs import is_causal, is_paired, position_limit, random_windows
from compiler.evaluate.loading import load_model
from compiler.evaluate.reader import cached, storage_bytes

CACHE_LENGTH = 64


@dataclass(frozen=True)
class CacheSize:
    """What the live key/value cache holds per token of one sequence, over all layers."""

    values_per_token: float
    bytes_per_token: float


def kv_cache(path: str | Path, *, trust_remote_code: bool = False) -> CacheSize:
    """The live cache of the model in ``path`` after a forward pass. Raises DataError when it has no growing cache."""
    size = cache_size(load_model(path, trust_remote_code=trust_remote_code))
    if size is None:
        raise DataError(
            "the model has no key/value cache", where=str(path), remedy="only models that write tokens have one"
        )
    return size


def cache_size(model: Any) -> CacheSize | None:
    """Sizes of the tensors in the cache after reading ``CACHE_LENGTH`` tokens, or as many as the model takes.

    Of an encoder-decoder what the decoder keeps of its own tokens. None without a growing cache.
    """
    if not is_causal(model) and not is_paired(model):
        return None
    length = min(CACHE_LENGTH, position_limit(model) or CACHE_LENGTH)
    (window,) = random_windows(model, 1, length, seed=0)
    with torch.inference_mode():
        cache = model(**window.cast(model.dtype), use_cache=True).past_key_values
    tensors = cached(getattr(cache, "self_attention_cache", cache))
    values = sum(tensor.numel() for tensor in tensors)
    return CacheSize(values / length, sum(storage_bytes(tensors)) / length)
