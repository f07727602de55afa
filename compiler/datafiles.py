"""Data that recipes name: a text file, or recordings of speech (a ``.wav`` file or a directory of them)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from compiler.errors import DataError

SUFFIX = ".wav"
TAKES = {"input_ids": "text", "input_features": "speech"}
INSTEAD = {
    "text": "name a text file",
    "speech": "name a directory of recordings (.wav)",
    "": "leave it out: there is no data for this kind of model",
}


def is_speech(data: Path) -> bool:
    """Whether ``data`` stands for recordings and not for a text."""
    return data.is_dir() or data.suffix.lower() == SUFFIX


def check_kind(inputs: Iterable[str], data: Path, model: str) -> None:
    """Raises DataError when ``data`` is not of the kind that a model takes whose inputs have these names."""
    takes = next((TAKES[name] for name in inputs if name in TAKES), "")
    given = "speech" if is_speech(data) else "text"
    if takes != given:
        raise DataError(f"a {model} takes no {given}, which `{data.name}` is", remedy=INSTEAD[takes])


def recordings(data: Path) -> list[Path]:
    """The recordings that ``data`` stands for, those of a directory and all below it in the order of their paths."""
    if not data.is_dir():
        return [data]
    return sorted(path for path in data.rglob("*") if path.suffix.lower() == SUFFIX and path.is_file())


def fingerprint(data: Path) -> str:
    """The sha256 of a file's bytes; of recordings in a directory that of their paths in it and their own sha256s."""
    if not data.is_dir():
        return _sha256(data.read_bytes())
    lines = [f"{path.relative_to(data).as_posix()} {_sha256(path.read_bytes())}\n" for path in recordings(data)]
    return _sha256("".join(lines).encode())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
