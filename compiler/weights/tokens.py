"""Tokenizer files of fewer tokens: which must stay, and the files written again with other numbers.

Of a tokenizer.json only tokens go, nothing else changes: a text all of whose tokens remain is cut into the same ones.
For pieces that are merged (BPE) that holds since with a token all the parts stay that some merge makes it from;
for the longest piece (WordPiece) and the likeliest pieces (Unigram) since what won against more wins against fewer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compiler.errors import MISSHAPEN, CheckpointError, first_line
from compiler.weights.checkpoint import Checkpoint
from compiler.weights.tensorfile import parse_json, read_document

TOKENIZER, SETTINGS = "tokenizer.json", ("tokenizer_config.json", "generation_config.json")
OTHER_FORMS = ("vocab.json", "merges.txt", "vocab.txt", "added_tokens.json", "*.model", "*.spm")
"""Forms of a tokenizer that tokenizer.json makes superfluous, and that would have the old numbers."""
KINDS = ("BPE", "WordPiece", "WordLevel", "Unigram")

Document = dict[str, Any]


@dataclass(frozen=True)
class Tokens:
    """``count`` tokens have a meaning. ``needed`` must stay, ``parts`` are what each can be merged from."""

    count: int
    needed: frozenset[int]
    parts: Mapping[int, frozenset[int]] = field(default_factory=dict[int, frozenset[int]])

    def with_parts(self, token: int) -> set[int]:
        """``token`` and all that it can be made from, in as many steps as it takes."""
        found, pending = {token}, [token]
        while pending:
            new = self.parts.get(pending.pop(), frozenset()) - found
            found |= new
            pending += new
        return found


def tokens_of(checkpoint: Checkpoint) -> Tokens:
    """The tokens of ``checkpoint``. Raises CheckpointError when its tokenizer cannot be written with fewer."""
    with tempfile.TemporaryDirectory() as folder, _explained(checkpoint.path):
        checkpoint.save_tokenizer(Path(folder))
        document = _tokenizer(Path(folder))
        named = {number for name in SETTINGS for number in _numbers(_read(Path(folder) / name))}
        return _tokens(checkpoint, document, named)


@contextmanager
def _explained(path: Path) -> Generator[None]:
    """Turn what damaged documents lead to into CheckpointError."""
    try:
        yield
    except MISSHAPEN as reason:
        cause = f"the files of the tokenizer do not fit each other, or are damaged: {first_line(reason)}"
        raise CheckpointError(cause, where=str(path), remedy="fetch the tokenizer again") from reason


def _tokens(checkpoint: Checkpoint, document: Document, named: set[int]) -> Tokens:
    model = document["model"]
    numbers = _vocabulary(model)
    added = {entry["id"] for entry in document.get("added_tokens") or []}
    needed = {*added, *named, *_numbers(checkpoint.config), *_letters(model, numbers), *_unknown(model, numbers)}
    return Tokens(max({*numbers.values(), *added}) + 1, frozenset(needed), _parts(model, numbers))


def keep_tokens(directory: Path, kept: Sequence[int]) -> None:
    """Write the tokenizer in ``directory`` again with the tokens ``kept`` alone, numbered in this order.

    Raises CheckpointError when its files are damaged.
    """
    with _explained(directory):
        _keep_tokens(directory, kept)


def _keep_tokens(directory: Path, kept: Sequence[int]) -> None:
    document, new = _tokenizer(directory), {token: number for number, token in enumerate(kept)}
    model = document["model"]
    remaining = {token: new[number] for token, number in _vocabulary(model).items() if number in new}
    if model["type"] == "Unigram":
        pieces = {number: model["vocab"][number] for number in _vocabulary(model).values()}
        model["vocab"] = [pieces[number] for number in kept if number in pieces]
        model["unk_id"] = new.get(model.get("unk_id"))
    else:
        model["vocab"] = remaining
    if model["type"] == "BPE":
        model["merges"] = [list(pair) for pair, made in _merges(model) if {*pair, made} <= remaining.keys()]
    for entry in document.get("added_tokens") or []:
        entry["id"] = new[entry["id"]]
    document["post_processor"] = _processor(document.get("post_processor"), new)
    if document.get("padding"):
        document["padding"]["pad_id"] = new[document["padding"]["pad_id"]]
    _write(directory / TOKENIZER, document)
    for name in SETTINGS:
        if (directory / name).exists():
            _write(directory / name, renumbered(_read(directory / name), kept))
    for file in {file for form in OTHER_FORMS for file in directory.glob(form)}:
        file.unlink()


def renumbered(document: Mapping[str, Any], kept: Sequence[int]) -> Document:
    """``document`` (a config) with the new numbers of tokens wherever it names some; those that went are left out."""
    new = {token: number for number, token in enumerate(kept)}
    made: Document = {}
    for name, value in document.items():
        if name == "added_tokens_decoder":
            made[name] = {str(new[int(number)]): entry for number, entry in value.items()}
        elif _names_tokens(name):
            made[name] = [new[token] for token in value if token in new] if _is_list(value) else new.get(value, value)
        else:
            made[name] = renumbered(value, kept) if _is_document(value) else value
    return made


def _numbers(document: Mapping[str, Any]) -> Iterator[int]:
    """The tokens that a config names."""
    for name, value in document.items():
        if name == "added_tokens_decoder":
            yield from map(int, value)
        elif _names_tokens(name):
            yield from (token for token in (value if _is_list(value) else [value]) if isinstance(token, int))
        elif _is_document(value):
            yield from _numbers(value)


def _names_tokens(name: str) -> bool:
    return name.endswith(("_token_id", "_token_ids")) or name in ("suppress_tokens", "begin_suppress_tokens")


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_document(value: Any) -> bool:
    return isinstance(value, dict)


def _vocabulary(model: Document) -> dict[str, int]:
    """The number of every token but added ones."""
    if model["type"] == "Unigram":
        return {piece: number for number, (piece, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _letters(model: Document, numbers: Mapping[str, int]) -> set[int]:
    """What every text can be cut into: bytes where the tokenizer falls back on them, otherwise single characters."""
    before, after = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    if model.get("byte_fallback"):
        return {number for token, number in numbers.items() if len(token) == 6 and token.startswith("<0x")}
    plain = ((token.removeprefix(before).removesuffix(after), number) for token, number in numbers.items())
    return {number for token, number in plain if len(token) == 1}


def _unknown(model: Document, numbers: Mapping[str, int]) -> set[int]:
    """What stands for all that cannot be cut."""
    return {number for number in (model.get("unk_id"), numbers.get(model.get("unk_token") or "")) if number is not None}


def _merges(model: Document) -> Iterator[tuple[tuple[str, str], str]]:
    """Every pair that is merged, and what it makes."""
    before = model.get("continuing_subword_prefix") or ""
    for entry in model["merges"]:
        left, right = entry.split(" ", 1) if isinstance(entry, str) else entry
        yield (left, right), left + right.removeprefix(before)


def _parts(model: Document, numbers: Mapping[str, int]) -> dict[int, frozenset[int]]:
    found: dict[int, frozenset[int]] = {}
    for pair, made in _merges(model) if model["type"] == "BPE" else ():
        if made in numbers:
            found[numbers[made]] = found.get(numbers[made], frozenset()) | {numbers[token] for token in pair}
    return found


def _processor(value: Any, new: Mapping[int, int]) -> Any:
    """A post-processor, or what it is made of, with the new numbers of the tokens that it adds."""
    if isinstance(value, list):
        return [_processor(each, new) for each in value]
    if not _is_document(value):
        return value
    made = {name: _processor(each, new) for name, each in value.items()}
    for name in ("sep", "cls"):  # (token, number)
        if _is_list(made.get(name)):
            made[name][1] = new[made[name][1]]
    if _is_list(made.get("ids")):
        made["ids"] = [new[token] for token in made["ids"]]
    return made


def _tokenizer(directory: Path) -> Document:
    document = _read(directory / TOKENIZER)
    model: Any = document.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if kind not in KINDS:
        cause = f"tokens of the kind {kind} cannot be left out" if document else f"there is no {TOKENIZER}"
        raise CheckpointError(cause, where=str(directory), remedy=f"tokenizers of {', '.join(KINDS)} can lose tokens")
    return document


def _read(path: Path) -> Document:
    return parse_json(read_document(path), path) if path.exists() else {}


def _write(path: Path, document: Document) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
