"""Greedy decoding of a loaded transformers model with its own cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compiler.evaluate.inputs import random_ids


def prompt_ids(tokenizer: Any, prompt: str, chat: bool | None = None) -> Tensor:
    """Token ids, int64 [1, length], of a prompt, in the chat template when ``chat`` (None: when there is one)."""
    if chat is None:
        chat = bool(getattr(tokenizer, "chat_template", None))
    if not chat:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    message = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]


def pieces(model: Any, tokenizer: Any, ids: Tensor, max_new_tokens: int) -> Iterator[str]:
    """The greedy continuation of ``ids``, one piece of text per token; a piece is empty inside a character."""
    written: list[int] = []
    shown = ""
    for token in greedy(model, ids, max_new_tokens):
        written.append(token)
        text = tokenizer.decode(written, skip_special_tokens=True)
        complete = "" if text.endswith("\ufffd") else text[len(shown) :]
        shown += complete
        yield complete


def greedy(model: Any, ids: Tensor, max_new_tokens: int, stop: bool = True) -> Iterator[int]:
    """Greedy tokens after ``ids`` [1, length]; with ``stop`` they end before an end-of-sequence token."""
    ends = model.generation_config.eos_token_id if stop else None
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    cache = None
    for _ in range(max_new_tokens):
        with torch.inference_mode():
            result = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, token = result.past_key_values, int(result.logits[0, -1].argmax())
        if token in ends:
            return
        yield token
        ids = torch.tensor([[token]])


def timed(model: Any, length: int, new_tokens: int) -> tuple[float, float]:
    """Seconds until the first new token, and for the ``new_tokens`` after it."""
    ids = random_ids(model, length, torch.Generator().manual_seed(0))[None]
    tokens = greedy(model, ids, new_tokens + 1, stop=False)
    started = time.perf_counter()
    next(tokens)
    first = time.perf_counter()
    for _ in tokens:
        pass
    return first - started, time.perf_counter() - first
