"""The texts of mla.py as windows of tokens: those to calibrate on, and those to score on that nothing else sees."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import WORK
from benchmarks.fetch import DATA
from compiler.errors import DataError
from compiler.evaluate import load_tokenizer
from compiler.evaluate.texts import TextData


@dataclass(frozen=True)
class Text:
    """A text to score on: the windows start at the character ``start`` of data/FILE."""

    file: str
    start: int = 0


TEXTS = {
    "wikipedia": Text("wikipedia.txt", 1_500_000),
    "persuasion": Text("persuasion.txt"),
    "brown_k": Text("brown_k.txt"),
    "brown_a": Text("brown_a.txt"),
    "northanger": Text("northanger.txt"),
    "mmlu": Text("mmlu.jsonl"),
    "wikipedia_early": Text("wikipedia.txt", 300_000),
}
CALIBRATION = [f"brown_{genre}.txt" for genre in "bcdef"]


@dataclass(frozen=True)
class Windows:
    """Where the tokens of one run, int64 [count, length], and what belongs to them are kept: stems of files.

    ``texts`` are STEM.pt with the tokens and STEM.npy with the original's logits; ``calibration``, by seed, STEM.pt
    and the same as words, STEM.txt.
    """

    folder: Path
    calibration: dict[int, str]
    texts: dict[str, str]


def cut(model: Path, options: argparse.Namespace) -> Windows:
    """The windows of this run, in files named after what is in them, so that runs share and never confuse them."""
    tokenizer = load_tokenizer(model)
    stamp = [str(model), (model / "config.json").stat().st_mtime]
    folder = WORK / "gqa-to-mla" / f"{model.name}-{digest(json.dumps(stamp).encode())}"
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        name: keep(first(tokens(tokenizer, read(name), options.length), options), name, folder)
        for name in options.texts
    }
    everything = "\n\n".join((DATA / file).read_text(encoding="utf-8") for file in CALIBRATION)
    available = tokens(tokenizer, everything, options.length)
    calibration: dict[int, str] = {}
    for seed in options.seeds:
        ids = chosen(available, options.calibration, seed)
        calibration[seed] = keep(ids, f"calibration-{seed}", folder)
        words = tokenizer.decode(ids.flatten(), skip_special_tokens=True)
        (folder / f"{calibration[seed]}.txt").write_text(words, encoding="utf-8")
    return Windows(folder, calibration, texts)


def read(name: str) -> str:
    return (DATA / TEXTS[name].file).read_text(encoding="utf-8")[TEXTS[name].start :]


def keep(windows: Tensor, name: str, folder: Path) -> str:
    stem = f"{name}-{digest(windows.numpy().tobytes())}"
    torch.save(windows.clone(), folder / f"{stem}.pt")
    return stem


def fitting(text: Path, model: Path, length: int, most: int, seed: int) -> int:
    """How many windows of ``length`` a recipe can ask of ``text``, at most ``most``."""
    tokenizer = load_tokenizer(model)
    for samples in range(most, 0, -1):
        try:
            TextData(text, samples, length, seed).windows(tokenizer)
        except DataError:
            continue
        return samples
    sys.exit(f"{text} has no window of {length} tokens: choose a smaller --ours-length")


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def tokens(tokenizer: Any, text: str, length: int) -> Tensor:
    """``text`` as windows int64 [as many as there are, length], each behind the tokens that start any text."""
    start = list(tokenizer("")["input_ids"])
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    rows = ids.unfold(0, length - len(start), length - len(start))
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(len(rows), -1), rows], dim=1)


def first(windows: Tensor, options: argparse.Namespace) -> Tensor:
    if len(windows) < options.windows:
        sys.exit(f"a text has {len(windows)} windows, {options.windows} are asked for")
    return windows[: options.windows]


def chosen(windows: Tensor, count: int, seed: int) -> Tensor:
    """``count`` windows, in the text's order: the first for seed 0, otherwise a random choice."""
    if seed == 0:
        return windows[:count]
    return windows[sorted(random.Random(seed).sample(range(len(windows)), count))]
