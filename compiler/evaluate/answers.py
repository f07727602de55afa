"""What a model says to a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from compiler.errors import DataError
from compiler.evaluate.decode import pieces, prompt_ids
from compiler.evaluate.inputs import is_causal
from compiler.evaluate.loading import load_model, load_tokenizer


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt. ``seconds`` counts reading the prompt and writing, not loading."""

    text: str
    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def generate(
    path: str | Path,
    prompt: str,
    max_new_tokens: int = 128,
    *,
    trust_remote_code: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """The model's greedy continuation of ``prompt``; ``on_text`` gets it piece by piece as it is made.

    The prompt is put into the tokenizer's chat template where there is one. Raises CheckpointError when model or
    tokenizer do not load, DataError when the model does not generate text or the prompt has no tokens.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    model = load_model(path, trust_remote_code=trust_remote_code)
    if not is_causal(model):
        raise DataError(
            f"a {type(model).__name__} does not continue texts",
            where=str(path),
            remedy="`compress-model eval` measures models of other kinds",
        )
    ids = prompt_ids(tokenizer, prompt)
    if not ids.numel():
        raise DataError("the prompt has no tokens", where=str(path), remedy="say something to the model")
    started, made = time.perf_counter(), list[str]()
    for piece in pieces(model, tokenizer, ids, max_new_tokens):
        made.append(piece)
        if on_text is not None:
            on_text(piece)
    return Answer("".join(made), len(made), time.perf_counter() - started)
