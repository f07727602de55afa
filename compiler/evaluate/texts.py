"""Texts as token windows: the same windows for the same text, tokenizer and seed, on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compiler.errors import DataError, first_line

CHARACTERS_PER_TOKEN = 8  # more than any language model's average on prose: a first guess at how much to tokenise

REMEDY = "name a text file in UTF-8"
LARGEST = 1 << 32
PIECE = 1 << 22


class Tokenizer(Protocol):
    """What is asked of a tokenizer: ``tokenizer(text)["input_ids"]`` are the token ids."""

    def __call__(self, text: str) -> Any: ...


@dataclass(frozen=True)
class TextData:
    """``samples`` windows of ``length`` tokens of a text, or so many clips or pictures, chosen by ``seed``."""

    data: Path
    samples: int = 16
    length: int = 512
    seed: int = 0

    def windows(self, tokenizer: Tokenizer) -> Tensor:
        """Token ids, int64 [samples, length]. Raises DataError when the file is no text, or too short."""
        if self.samples < 1 or self.length < 2:
            cause = f"cannot take {self.samples} windows of {self.length} tokens"
            raise DataError(cause, remedy="samples >= 1 and length >= 2")
        parts = stretches(self.data, self.samples)
        return token_windows(parts, tokenizer, self.length, self.seed, str(self.data))


def stretches(path: Path, count: int) -> Iterator[str]:
    """A UTF-8 text in ``count`` equal parts, one after the other; what is left over is no part of any.

    The file is read twice, a part at a time is in memory. Raises DataError when it is no such text, or empty.
    """
    try:
        if path.exists() and not path.is_file():
            raise DataError("is no regular file", where=str(path), remedy=REMEDY)
        if path.exists() and path.stat().st_size > LARGEST:
            raise DataError(f"a text of more than {LARGEST} bytes", where=str(path), remedy="take a part of it")
        with path.open(encoding="utf-8") as file:
            pieces = [(len(piece), bool(piece.strip())) for piece in iter(partial(file.read, PIECE), "")]
            if not any(filled for _, filled in pieces):
                raise DataError("the text is empty", where=str(path), remedy=REMEDY)
            file.seek(0)
            size = sum(length for length, _ in pieces) // count
            yield from (file.read(size) if size else "" for _ in range(count))
    except OSError as reason:
        raise DataError(f"cannot read the text: {reason.strerror}", where=str(path), remedy=REMEDY) from reason
    except UnicodeDecodeError as reason:
        raise DataError("is no UTF-8 text", where=str(path), remedy=REMEDY) from reason


def token_windows(parts: Iterable[str], tokenizer: Tokenizer, length: int, seed: int, where: str = "") -> Tensor:
    """Windows of ``length`` tokens, one from each of the ``parts`` of a text, which follow each other.

    Where a window lies in its stretch depends on ``seed``; it starts at a word. Each is tokenised by itself, so it
    starts with the special tokens that the tokenizer puts first. Returns int64 [parts, length].
    """
    place = random.Random(seed)
    rows = [_window(part, tokenizer, length, place) for part in parts]
    short = [len(row) for row in rows if len(row) < length]
    if short:
        raise DataError(
            f"the text is too short for {len(rows)} windows of {length} tokens: one part of it has {min(short)}",
            remedy="use a longer text, fewer `samples` or a shorter `length`",
            where=where,
            option="samples" if sum(map(len, rows)) >= length else "length",
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
