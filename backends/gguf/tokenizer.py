"""The tokenizer of a checkpoint as metadata of a GGUF file.

A GGUF file that the model came from has it already. Otherwise it is made from tokenizer.json: byte-level BPE becomes
``gpt2``, BPE over pieces with spaces as U+2581 ``llama``, unigram ``t5``. How text is split before BPE is code in
llama.cpp that a name selects: a tokenizer that splits in a way with no name here is refused, since it would give other
tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backends.gguf.header import Metadata
from compiler.errors import TargetError

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
SPLITS = {CONTRACTIONS + "\\p{N}{1,3}" + REST: "llama-bpe", CONTRACTIONS + "\\p{N}" + REST: "qwen2"}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
SPACE = "▁"
ADDED_SCORE = -1000.0

Json = Mapping[str, Any]


def tokenizer_metadata(directory: Path, size: int) -> Metadata:
    """The entries for the tokenizer files in ``directory``, with ``size`` tokens; none without tokenizer.json.

    Raises TargetError for a tokenizer that llama.cpp has no code for.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return {"tokenizer.ggml.model": "none"}
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    config = _read(directory / "tokenizer_config.json")
    found = {**_vocabulary(tokenizer, size), **_special(tokenizer, config)}
    template = directory / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template")
    return {**found, "tokenizer.chat_template": text} if isinstance(text, str) else found


def _read(path: Path) -> Json:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _vocabulary(tokenizer: Json, size: int) -> Metadata:
    model = tokenizer["model"]
    if model["type"] == "Unigram":
        pieces = {piece: index for index, (piece, _) in enumerate(model["vocab"])}
        scores = {piece: float(score) for piece, score in model["vocab"]}
        return {"tokenizer.ggml.model": "t5", **_tokens(tokenizer, pieces, size), **_scores(pieces, scores, size)}
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
        "tokenizer.ggml.add_space_prefix": "Prepend" in json.dumps(tokenizer.get("normalizer")),
    }


def _merges(merges: list[str]) -> Metadata:
    return {"tokenizer.ggml.merges": merges} if merges else {"tokenizer.ggml.merges": [""]}


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
        token = config.get(key)
        text = token["content"] if isinstance(token, dict) else token
        if text in numbers:
            found[f"tokenizer.ggml.{name}_token_id"] = numbers[text]
    around = json.dumps(tokenizer.get("post_processor") or {})
    for key in ("bos", "eos"):
        token = config.get(f"{key}_token")
        text = token["content"] if isinstance(token, dict) else token
        found[f"tokenizer.ggml.add_{key}_token"] = bool(text) and f'"id": {json.dumps(text)}' in around
    return found


def _split(tokenizer: Json) -> str:
    """llama.cpp's name for how text is split before byte-level BPE."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    levels = [step for step in steps if step["type"] == "ByteLevel"]
    digits = [step for step in steps if step["type"] == "Digits"]
    others = [step["type"] for step in steps if step["type"] not in ("Split", "ByteLevel", "Digits")]
    if others or len(levels) != 1 or levels[0].get("add_prefix_space"):
        raise _unknown(f"pre-tokenizers {', '.join(step['type'] for step in steps) or 'none'}")
    if levels[0].get("use_regex", True) and not patterns:
        return "smollm" if digits and digits[0].get("individual_digits") else "gpt-2"
    if len(patterns) == 1 and patterns[0] in SPLITS and not digits:
        return SPLITS[patterns[0]]
    raise _unknown(f"the split {patterns[0] if patterns else 'of bytes alone'}")


def _steps(found: Json | None) -> list[Json]:
    if not found:
        return []
    return list(found["pretokenizers"]) if found["type"] == "Sequence" else [found]


def _unknown(what: str) -> TargetError:
    return TargetError(
        f"llama.cpp has no name for a tokenizer with {what}",
        remedy="leave `gguf` out of `emit`, or its tokenizer files",
    )
