"""Samples that a language model writes itself: calibration for what a text at hand does not show.

A text is of one kind; what a model knows is of all the kinds that it was trained on. Samples drawn from the model
itself cover these without any other data (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiler.calibration.sweep import quick_products
from compiler.errors import DataError
from compiler.evaluate.inputs import is_causal, position_limit
from compiler.evaluate.texts import Tokenizer

LENGTH = 256  # the first tokens are the most varied, and short samples are quicker to write
BATCH = 64


def own_text(model: Any, tokenizer: Tokenizer, samples: int, length: int, seed: int) -> Tensor:
    """Token ids, int64 [samples, at most 256 and ``length``], each drawn from the distribution of ``model``.

    A sample starts with what the tokenizer puts first and a token drawn evenly from the vocabulary, so that samples
    spread. Raises DataError when the model does not continue texts.
    """
    if not is_causal(model):
        raise DataError(
            f"{type(model).__name__} does not continue texts, so it writes no samples", remedy="leave `written` out"
        )
    source = torch.Generator().manual_seed(seed)
    first = list(tokenizer("")["input_ids"])
    words = torch.randint(model.config.get_text_config().vocab_size, (samples, 1), generator=source)
    starts = torch.cat([torch.tensor(first, dtype=torch.int64).expand(samples, len(first)), words], 1)
    most = min(length, LENGTH, position_limit(model) or LENGTH)
    with torch.inference_mode(), quick_products():
        return torch.cat([_continued(model, part, most, source) for part in starts.split(BATCH)]).clone()


def _continued(model: Any, ids: Tensor, length: int, source: torch.Generator) -> Tensor:
    """``ids`` [batch, tokens] and what the model draws after them, [batch, length]."""
    cache, fed = None, ids
    while ids.shape[1] < length:
        done = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = done.past_key_values
        fed = torch.multinomial(done.logits[:, -1].float().softmax(-1), 1, generator=source)
        ids = torch.cat([ids, fed], 1)
    return ids[:, :length]
