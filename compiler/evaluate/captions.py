"""Pictures, each with a text beside it, as calls of models that take both at once and compare all with all (CLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiler.datafiles import CAPTIONED, caption_file, captioned_files
from compiler.errors import DataError, first_line
from compiler.evaluate.images import Size
from compiler.evaluate.photographs import picked_files, pictures_of
from compiler.evaluate.texts import TextData

TOGETHER = 8
"""Pairs in a call: with one alone there is nothing to tell it from."""
LONGEST = 1 << 20


def captioned_calls(
    path: str | Path, data: TextData, tokenizer: Any, size: Size | None, usual: Size, limit: int | None
) -> list[dict[str, Tensor]]:
    """``data.samples`` pairs, those that ``data.seed`` picks, up to eight a call: ``input_ids`` int64 [pairs, tokens]
    and ``pixel_values`` float32 [pairs, 3, height, width].

    Texts are cut to ``data.length`` tokens, or to ``limit``, which the model has positions for. Those of a call are
    padded on the right to the longest; where the tokenizer makes no attention mask, so that padding is read, to the
    ``limit``, as SigLIP is trained. Pictures are made as ``photographs`` makes them. Raises DataError where there are
    too few, or a file cannot be read.
    """
    files = picked_files(captioned_files(data.data), data.data, data.samples, data.seed, CAPTIONED)
    most = min(data.length, limit) if limit else data.length
    ids = [_tokens(tokenizer, caption_file(each), most) for each in files]
    least = most if "attention_mask" not in tokenizer.model_input_names else 0
    padding = tokenizer.pad_token_id or 0
    made = pictures_of(path, files, size, usual)
    parts = [slice(start, start + TOGETHER) for start in range(0, len(files), TOGETHER)]
    return [_call(ids[part], made[part], least, padding) for part in parts]


def _call(ids: Sequence[Sequence[int]], pictures: Sequence[Tensor], least: int, padding: int) -> dict[str, Tensor]:
    width = max(least, *map(len, ids))
    rows = [[*each, *[padding] * (width - len(each))] for each in ids]
    return {"input_ids": torch.tensor(rows, dtype=torch.int64), "pixel_values": torch.cat(list(pictures))}


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LONGEST:
            raise DataError(f"a text of more than {LONGEST} bytes", where=str(path), remedy="write a line or two")
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as reason:
        cause = f"cannot read the text of a picture: {first_line(reason)}"
        raise DataError(cause, where=str(path), remedy="write it in UTF-8") from reason
    if not text:
        raise DataError("the text of a picture is empty", where=str(path), remedy="write one, or leave the pair out")
    return text


def _tokens(tokenizer: Any, path: Path, most: int) -> list[int]:
    text = _text(path)
    try:
        ids = list(tokenizer(text, truncation=True, max_length=most)["input_ids"])
    except Exception as reason:  # settings of a tokenizer are used unchecked
        cause = f"the tokenizer cannot cut a text: {first_line(reason)}"
        raise DataError(cause, remedy="correct the settings in tokenizer_config.json") from reason
    if not ids:
        raise DataError("the tokenizer makes no token of a text", where=str(path), remedy="write another one")
    return ids
