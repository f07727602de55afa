"""The tokenizer of a checkpoint as metadata of a GGUF file.

A GGUF file that the model came from has it already. Otherwise it is made from tokenizer.json: byte-level BPE becomes
``gpt2``, BPE over pieces with spaces as U+2581 ``llama``, unigram ``t5``. How text is split before BPE is code in
llama.cpp that a name selects: a tokenizer that splits in a way with no name here is refused, since it would give other
tokens.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.gguf.header import Metadata
from compiler.errors import TargetError
from compiler.weights.gguf_header import read_gguf_header
from compiler.weights.source import Source
from compiler.weights.tensorfile import parse_json, read_document

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
SPLITS = {CONTRACTIONS + "\\p{N}{1,3}" + REST: "llama-bpe", CONTRACTIONS + "\\p{N}" + REST: "qwen2"}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
WORD_PIECES = {"bos": "[CLS]", "seperator": "[SEP]", "unknown": "[UNK]", "padding": "[PAD]", "mask": "[MASK]"}
SPACE = "▁"
ADDED_SCORE = -1000.0

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Tokenizer:
    """The entries of a header for a tokenizer, and what the user should know of it."""

    metadata: Metadata = field(default_factory=lambda: {"tokenizer.ggml.model": "none"})
    notes: tuple[str, ...] = ()


def tokenizer_of(model: Source | None, size: int, kept: Sequence[int] | None = None) -> Tokenizer:
    """That of a checkpoint with ``size`` tokens: as a GGUF file has it, or made from the files beside its weights.

    ``kept`` are the tokens that remain; None: all. Raises TargetError for a tokenizer that llama.cpp cannot have.
    """
    from compiler.weights.checkpoint import Checkpoint
    from compiler.weights.tokens import keep_tokens

    if not isinstance(model, Checkpoint):
        return Tokenizer()
    (file, *_) = model.files
    if kept is None and file.suffix == ".gguf":
        found = read_gguf_header(file).metadata
        return Tokenizer({key: value for key, value in found.items() if key.startswith("tokenizer.")})
    with tempfile.TemporaryDirectory() as folder:
        model.save_tokenizer(Path(folder))
        if kept is not None:
            keep_tokens(Path(folder), kept)
        return tokenizer_in(Path(folder), size)


def tokenizer_in(directory: Path, size: int) -> Tokenizer:
    """What the tokenizer files in ``directory`` give, with ``size`` tokens; no tokenizer without tokenizer.json.

    Added tokens that the model has no row for are left out, with a note. Raises TargetError for a tokenizer that
    llama.cpp has no code for, or with other tokens beyond ``size``, CheckpointError for files that are no JSON.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return Tokenizer()
    tokenizer, notes = _fitting(_read(path), size)
    config = _read(directory / "tokenizer_config.json")
    found = {**_special(tokenizer, config), **_vocabulary(tokenizer, size)}
    template = directory / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template")
    return Tokenizer({**found, "tokenizer.chat_template": text} if isinstance(text, str) else found, notes)


def _fitting(tokenizer: Json, size: int) -> tuple[Json, tuple[str, ...]]:
    """``tokenizer`` without added tokens beyond ``size``, and a note that names them."""
    added: list[Json] = tokenizer.get("added_tokens") or []
    beyond = {entry["content"]: entry["id"] for entry in added if entry["id"] >= size}
    vocabulary = _numbers(tokenizer["model"])
    wrong = next((text for text, index in vocabulary.items() if index >= size and text not in beyond), None)
    if wrong is not None:
        raise _unknown(f"the token {wrong!r}, number {vocabulary[wrong]}, where the model has {size} tokens")
    if not beyond:
        return tokenizer, ()
    model = dict(tokenizer["model"])
    if model["type"] == "Unigram":
        model["vocab"] = model["vocab"][:size]
    else:
        model["vocab"] = {text: index for text, index in vocabulary.items() if index < size}
    left = [entry for entry in added if entry["id"] < size]
    note = f"tokens that the model has no row for are left out of the tokenizer: {', '.join(sorted(beyond))}"
    return {**tokenizer, "model": model, "added_tokens": left}, (note,)


def _numbers(model: Json) -> Mapping[str, int]:
    """The number of every token but added ones."""
    if model["type"] == "Unigram":
        return {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    return model["vocab"]


def _read(path: Path) -> Json:
    return parse_json(read_document(path), path) if path.exists() else {}


def _vocabulary(tokenizer: Json, size: int) -> Metadata:
    model = tokenizer["model"]
    if model["type"] == "Unigram":
        pieces = _numbers(model)
        scores = {piece: float(score) for piece, score in model["vocab"]}
        return {"tokenizer.ggml.model": "t5", **_tokens(tokenizer, pieces, size), **_scores(pieces, scores, size)}
    if model["type"] == "WordPiece":
        return _word_pieces(tokenizer, size)
    if model["type"] != "BPE":
        raise _unknown(f"a model of the type {model['type']}")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens = _tokens(tokenizer, model["vocab"], size)
    if not model.get("byte_fallback"):
        return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _split(tokenizer), **tokens, **_merges(merges)}
    ranks = {pair.replace(" ", "", 1): -float(rank) for rank, pair in reversed(list(enumerate(merges)))}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        **tokens,
        **_scores(model["vocab"], ranks, size),
        "tokenizer.ggml.add_space_prefix": _prefixed(tokenizer),
    }


def _word_pieces(tokenizer: Json, size: int) -> Metadata:
    """Pieces that continue a word bare, those that begin one behind a U+2581. llama.cpp splits as uncased BERT does."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer") or {}
    if not _is_uncased(normalizer) or (tokenizer.get("pre_tokenizer") or {}).get("type") != "BertPreTokenizer":
        raise _unknown("word pieces of another normalizer than that of uncased BERT")
    continued, special = model["continuing_subword_prefix"], {added["content"] for added in tokenizer["added_tokens"]}

    def spelt(text: str) -> str:
        if text in special:
            return text
        return text.removeprefix(continued) if text.startswith(continued) else SPACE + text

    found = _tokens(tokenizer, model["vocab"], size)
    numbers = {**model["vocab"], **{added["content"]: added["id"] for added in tokenizer["added_tokens"]}}
    own = {name: numbers[text] for name, text in WORD_PIECES.items() if text in numbers}
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": [spelt(text) for text in found["tokenizer.ggml.tokens"]],
        "tokenizer.ggml.token_type": found["tokenizer.ggml.token_type"],
        "tokenizer.ggml.add_bos_token": True,
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in own.items()},
    }


def _is_uncased(normalizer: Json) -> bool:
    """Whether a normalizer does all that llama.cpp does; accents go with capitals unless it says otherwise."""
    whole = all(normalizer.get(step) for step in ("lowercase", "clean_text", "handle_chinese_chars"))
    return normalizer.get("type") == "BertNormalizer" and whole and normalizer.get("strip_accents") is not False


def _prefixed(tokenizer: Json) -> bool:
    """Whether a text gets a space in front.

    llama.cpp writes spaces as U+2581 and cuts nowhere before it merges; what does otherwise is refused.
    """
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    steps = _steps(tokenizer.get("pre_tokenizer"))
    if not normalizers and len(steps) == 1 and _is_whole(steps[0]):
        return steps[0].get("prepend_scheme", "always") != "never"
    prepends = normalizers.count({"type": "Prepend", "prepend": SPACE})
    replaced = normalizers.count({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    idle = all(step["type"] == "Split" and step["pattern"] == {"String": " "} for step in steps)  # no space is left
    if prepends <= 1 and replaced == 1 and prepends + replaced == len(normalizers) and idle:
        return bool(prepends)
    names = [step["type"] for step in (*normalizers, *steps)]
    raise _unknown(f"BPE over pieces that are made by {', '.join(names) or 'nothing'} in this way")


def _is_whole(step: Json) -> bool:
    """Whether a pre-tokenizer writes spaces as U+2581 and leaves the text in one piece."""
    return step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True)


def _merges(merges: list[str]) -> Metadata:
    return {"tokenizer.ggml.merges": merges or [""]}


def _tokens(tokenizer: Json, vocabulary: Mapping[str, int], size: int) -> Metadata:
    """Texts and kinds of all tokens; numbers that no token has are filled up."""
    texts, kinds = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    unknown = tokenizer["model"].get("unk_token")
    for text, index in vocabulary.items():
        texts[index] = text
        kinds[index] = UNKNOWN if text == unknown else BYTE if _is_byte(text, tokenizer) else NORMAL
    for added in tokenizer.get("added_tokens", ()):
        index = added["id"]
        texts[index], kinds[index] = added["content"], CONTROL if added["special"] else USER
    return {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": kinds}


def _is_byte(text: str, tokenizer: Json) -> bool:
    return bool(tokenizer["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", text))


def _scores(vocabulary: Mapping[str, int], scores: Mapping[str, float], size: int) -> Metadata:
    found = [ADDED_SCORE] * size
    for text, index in vocabulary.items():
        found[index] = scores.get(text, ADDED_SCORE)
    return {"tokenizer.ggml.scores": found}


def _special(tokenizer: Json, config: Json) -> Metadata:
    """The numbers of special tokens, and which of them are put around a text."""
    numbers = {**tokenizer["model"]["vocab"]} if isinstance(tokenizer["model"]["vocab"], dict) else {}
    numbers |= {added["content"]: added["id"] for added in tokenizer.get("added_tokens", ())}
    found: dict[str, Any] = {}
    for key, name in SPECIAL.items():
        text = _text(config.get(key))
        if text in numbers:
            found[f"tokenizer.ggml.{name}_token_id"] = numbers[text]
    around = json.dumps(tokenizer.get("post_processor") or {})
    for key in ("bos", "eos"):
        text = _text(config.get(f"{key}_token"))
        found[f"tokenizer.ggml.add_{key}_token"] = bool(text) and f'"id": {json.dumps(text)}' in around
    return found


def _text(token: Any) -> Any:
    return token["content"] if isinstance(token, dict) else token


def _split(tokenizer: Json) -> str:
    """llama.cpp's name for how text is split before byte-level BPE."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    digits = [step for step in steps if step["type"] == "Digits"]
    others = [step["type"] for step in steps if step["type"] not in ("Split", "ByteLevel", "Digits")]
    whole = [step for step in digits if not step.get("individual_digits")]
    if others or whole or len(levels) != 1 or levels[0].get("add_prefix_space"):
        raise _unknown(f"pre-tokenizers {', '.join(step['type'] for step in steps) or 'none'}")
    if levels[0].get("use_regex", True) and not patterns:
        return "smollm" if digits else "gpt-2"
    if len(patterns) == 1 and patterns[0] in SPLITS and not digits:
        return SPLITS[patterns[0]]
    raise _unknown(f"the split {patterns[0] if patterns else 'of bytes alone'}")


def _steps(found: Json | None, members: str = "pretokenizers") -> list[Json]:
    if not found:
        return []
    return list(found[members]) if found["type"] == "Sequence" else [found]


def _unknown(what: str) -> TargetError:
    return TargetError(
        f"llama.cpp has no name for a tokenizer with {what}",
        remedy="leave `gguf` out of `emit`, or the tokenizer files out of the checkpoint",
    )
