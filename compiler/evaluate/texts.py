"""Texts as token windows: the same windows for the same text, tokenizer and seed, on every machine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compiler.errors import DataError, first_line

CHARACTERS_PER_TOKEN = 8  # more than any language model's average on prose: a first guess at how much to tokenise

REMEDY = "name a text file in UTF-8"
LARGEST = 1 << 32


class Tokenizer(Protocol):
    """What is asked of a tokenizer: ``tokenizer(text)["input_ids"]`` are the token ids."""

    def __call__(self, text: str) -> Any: ...


@dataclass(frozen=True)
class TextData:
    """``samples`` windows of ``length`` tokens of a text file, or clips of recordings, placed by ``seed``."""

    data: Path
    samples: int = 16
    length: int = 512
    seed: int = 0

    def windows(self, tokenizer: Tokenizer) -> Tensor:
        """Token ids, int64 [samples, length]. Raises DataError when the file is no text, or too short."""
        return token_windows(read_text(self.data), tokenizer, self.samples, self.length, self.seed, str(self.data))


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises DataError when there is none."""
    try:
        if path.exists() and not path.is_file():
            raise DataError("is no regular file", where=str(path), remedy=REMEDY)
        if path.exists() and path.stat().st_size > LARGEST:
            raise DataError(f"a text of more than {LARGEST} bytes", where=str(path), remedy="take a part of it")
        text = path.read_text(encoding="utf-8")
    except OSError as reason:
        raise DataError(f"cannot read the text: {reason.strerror}", where=str(path), remedy=REMEDY) from reason
    except UnicodeDecodeError as reason:
        raise DataError(f"is no UTF-8 text: byte {reason.start} is not", where=str(path), remedy=REMEDY) from reason
    if not text.strip():
        raise DataError("the text is empty", where=str(path), remedy=REMEDY)
    return text


def token_windows(text: str, tokenizer: Tokenizer, samples: int, length: int, seed: int, where: str = "") -> Tensor:
    """``samples`` windows that do not overlap, one from each of as many equal stretches of ``text``.

    Where a window lies in its stretch depends on ``seed``; it starts at a word. Each is tokenised by itself, so it
    starts with the special tokens that the tokenizer puts first. Returns int64 [samples, length].
    """
    if samples < 1 or length < 2:
        raise DataError(f"cannot take {samples} windows of {length} tokens", remedy="samples >= 1 and length >= 2")
    place = random.Random(seed)
    stretch = len(text) // samples
    rows = [_window(text[i * stretch : (i + 1) * stretch], tokenizer, length, place) for i in range(samples)]
    short = [len(row) for row in rows if len(row) < length]
    if short:
        raise DataError(
            f"the text is too short for {samples} windows of {length} tokens: one part of it has {min(short)}",
            remedy="use a longer text, or fewer or shorter windows",
            where=where,
        )
    return torch.tensor(rows, dtype=torch.int64)


def _window(stretch: str, tokenizer: Tokenizer, length: int, place: random.Random) -> Sequence[int]:
    needed = length * CHARACTERS_PER_TOKEN
    start = _word_start(stretch, place.randrange(max(1, len(stretch) - needed)))
    ids = _encode(tokenizer, stretch[start : start + needed])
    if len(ids) < length:  # few characters a token do not fit the guess, many tokens a character do
        ids = _encode(tokenizer, stretch)
    return ids[:length]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    try:
        return list(tokenizer(text)["input_ids"])
    except Exception as reason:  # settings of a tokenizer are used unchecked
        cause = f"the tokenizer cannot cut the text: {first_line(reason)}"
        raise DataError(cause, remedy="correct the settings in tokenizer_config.json") from reason


def _word_start(text: str, position: int) -> int:
    if position == 0:
        return 0
    space = text.find(" ", position)
    return space + 1 if space >= 0 else position
