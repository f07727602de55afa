"""word-errors: what a model of speech writes, beside what was said, or beside what the original writes."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compiler.datafiles import recordings
from compiler.errors import DataError
from compiler.evaluate.estimates import Array
from compiler.evaluate.inputs import position_limit
from compiler.evaluate.items import read_items, refuse
from compiler.evaluate.loading import load_extractor, quiet
from compiler.evaluate.metrics.base import Given, Task
from compiler.evaluate.speech import clip_features

FIELDS: Mapping[str, Any] = {"audio": str, "text": str}


@dataclass(frozen=True)
class Heard:
    """What was written of a recording, and what was said, where that is known."""

    written: str
    said: str | None


def words(text: str) -> list[str]:
    """``text`` in lower case, without accents and punctuation, as words; an apostrophe stays inside a word.

    So do marks that spell a word: vowel signs, tones and viramas of the scripts of India and South-East Asia.
    """
    plain = unicodedata.normalize("NFKD", text.lower()).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    letters = "".join(letter for letter in plain if not _accent(letter))
    spaced = "".join(letter if _in_word(letter) else " " for letter in letters)
    return [word.strip("'") for word in spaced.split() if any(map(str.isalnum, word))]


def _accent(letter: str) -> bool:
    """Whether it is an accent (combining classes from 200 on), or a point of Hebrew or Arabic (10 to 36)."""
    order = unicodedata.combining(letter)
    return order >= 200 or 10 <= order <= 36


def _in_word(letter: str) -> bool:
    return letter.isalnum() or letter == "'" or unicodedata.category(letter).startswith("M")


def word_edits(written: Sequence[str], said: Sequence[str]) -> int:
    """The fewest words to insert, delete and replace that turn ``written`` into ``said`` (Levenshtein's distance)."""
    above = list(range(len(said) + 1))
    for row, word in enumerate(written, 1):
        line = [row]
        for column, other in enumerate(said, 1):
            line.append(min(above[column] + 1, line[-1] + 1, above[column - 1] + (word != other)))
        above = line
    return above[-1]


def transcript(model: Any, tokenizer: Any, features: Tensor) -> str:
    """What ``model`` writes of audio ``features`` [1, bands, frames], greedily."""
    limit = position_limit(model)
    with torch.inference_mode(), quiet():
        ids = model.generate(input_features=features, do_sample=False, num_beams=1, max_length=limit)
    return tokenizer.decode(ids[0], skip_special_tokens=True)


def _clips(given: Given) -> Iterator[tuple[Path, str | None, str]]:
    """Recordings with what is said in them: those of the items, or ``samples`` of the data without."""
    if given.items is not None:
        for item, where in read_items(given.items, FIELDS, "word-errors"):
            path = given.items.parent / item["audio"]
            if not words(item["text"]):
                refuse("`text` has no words", where, "leave recordings without speech out")
            if not path.is_file():
                refuse(f"there is no recording `{item['audio']}`", where, "paths are relative to the file of items")
            yield path, item["text"], where
        return
    assert given.data is not None  # a metric of speech is not chosen without data
    found = recordings(given.data)
    picked = sorted(random.Random(given.seed).sample(range(len(found)), min(given.samples, len(found))))
    yield from ((found[index], None, str(found[index])) for index in picked)


def _observe(model: Any, given: Given) -> list[Heard]:
    extractor = load_extractor(given.path, model.config)
    found = list[Heard]()
    for path, said, where in _clips(given):
        clips = clip_features(extractor, path)
        if said is not None and len(clips) > 1:
            raise DataError("the recording is longer than the model hears at once", where=where, remedy="cut it")
        found += [Heard(transcript(model, given.tokenizer, clip), said) for clip in clips]
    return found


def _score(ours: Sequence[Heard], theirs: Sequence[Heard] | None) -> Mapping[str, Array]:
    found: dict[str, Array] = {}
    if all(one.said is not None for one in ours):
        found["to what was said"] = _rows([(one.written, one.said or "") for one in ours])
    if theirs is not None and any(words(other.written) for other in theirs):
        pairs = zip(ours, theirs, strict=True)
        found["to the original's words"] = _rows([(one.written, other.written) for one, other in pairs])
    return found


def _rows(pairs: Sequence[tuple[str, str]]) -> Array:
    counted = ((words(written), words(said)) for written, said in pairs)
    return np.array([(float(word_edits(written, said)), float(len(said))) for written, said in counted])


WORD_ERRORS = Task(_observe, _score, "speech", "speech")
