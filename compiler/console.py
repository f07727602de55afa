"""What the command says and shows: progress bars on a terminal, plain lines otherwise, tables as aligned text.

Results go to standard output, everything else to standard error, so that a result can be piped on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import TextIO

Advance = Callable[[int, int], None]
SECONDS_BETWEEN_LINES = 5.0


class Console:
    """Prints for a person. ``quiet`` keeps everything but results and errors to itself."""

    def __init__(self, *, quiet: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self.quiet = quiet
        self._out = out or sys.stdout
        self._err = err or sys.stderr

    def result(self, text: str) -> None:
        """Print what the user asked for."""
        _write(self._out, text if text.endswith("\n") else text + "\n")

    def stream(self, text: str) -> None:
        """Print a part of what the user asked for, at once."""
        _write(self._out, text)

    def say(self, text: str) -> None:
        """Tell what is going on."""
        if not self.quiet:
            _write(self._err, text + "\n")

    def error(self, text: str) -> None:
        """Print an error message."""
        _write(self._err, text + "\n")

    @contextmanager
    def progress(self, what: str) -> Generator[Advance]:
        """Show the progress of ``what``; the function yielded takes (done, all) in any unit."""
        if self.quiet:
            yield lambda done, total: None
        elif self._err.isatty():
            with _bar(what, self._err) as advance:
                yield advance
        else:
            yield _Lines(what, self.say)


def _write(stream: TextIO, text: str) -> None:
    """Write at once; letters that the stream's encoding lacks become question marks."""
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "replace").decode(encoding))
    stream.flush()


@contextmanager
def _bar(what: str, stream: TextIO) -> Generator[Advance]:
    from rich.console import Console as Rich
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Rich(file=stream)) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Lines:
    """Progress as a line now and then, and always one at the end."""

    def __init__(self, what: str, say: Callable[[str], None]) -> None:
        self._what = what
        self._say = say
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            self._say(f"{self._what}: {100 * done // max(1, total)}%")


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Aligned columns under a header row; the first ``left`` columns to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(_cell(cell, widths[i], i < left) for i, cell in enumerate(row)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _cell(text: str, width: int, to_left: bool) -> str:
    return text.ljust(width) if to_left else text.rjust(width)


def human_bytes(count: float) -> str:
    """``human_bytes(1_500_000) == "1.50 MB"``; decimal units."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: float) -> str:
    """``human_count(1_500_000) == "1.50 M"``."""
    return _scaled(count, ("", "k", "M", "G", "T", "P"))


def _scaled(count: float, units: Sequence[str]) -> str:
    for unit in units:
        if abs(count) < 1000 or unit == units[-1]:
            digits = f"{count:.0f}" if unit == units[0] else f"{count:.2f}" if count < 100 else f"{count:.1f}"
            return f"{digits} {unit}".rstrip()
        count /= 1000
    return ""
