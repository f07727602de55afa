"""The record of what has safely reached the disk, so that an interrupted write goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast


class Journal:
    """Names of finished tensors, a JSON list a line, valid for the job called ``key`` only.

    A journal of another job is started anew. A line ends in a checksum; one that was cut short by a crash, or damaged,
    is ignored: its tensors are simply written again.
    """

    def __init__(self, path: Path | None, key: str) -> None:
        self._path = path
        self._key = key
        self.finished: frozenset[str] = frozenset(self._read())

    def begin(self, reusable: Iterable[str]) -> None:
        """Start the file with those finished tensors that are ``reusable``; the others count as not finished."""
        self.finished &= frozenset(reusable)
        if self._path is None:
            return
        lines = [_line({"job": self._key}), _line(sorted(self.finished))]
        temporary = self._path.with_suffix(".new")
        with temporary.open("w") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fdatasync(file.fileno())
        temporary.replace(self._path)

    def add(self, names: Iterable[str]) -> None:
        """Record tensors whose bytes are on the disk."""
        if self._path is None:
            return
        with self._path.open("a") as file:
            file.write(_line(list(names)) + "\n")
            file.flush()
            os.fdatasync(file.fileno())

    def _read(self) -> list[str]:
        if self._path is None or not self._path.exists():
            return []
        head, *lines = [_parsed(line) for line in self._path.read_text(errors="replace").splitlines()] or [None]
        if not isinstance(head, dict) or cast(dict[str, Any], head).get("job") != self._key:
            return []
        return [name for line in lines if isinstance(line, list) for name in cast(list[str], line)]


def _line(value: Any) -> str:
    text = json.dumps(value)
    return f"{text} {_checksum(text)}"


def _parsed(line: str) -> Any:
    """What a line holds; None when it is not what was written."""
    text, _, checksum = line.rpartition(" ")
    return json.loads(text) if checksum == _checksum(text) else None


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
