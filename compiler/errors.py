"""Every mistake a user can meet, as one exception class each: where, what, and what to do about it.

The command prints ``str(error)`` and exits with ``error.exit_code``; nothing else is ever shown to a user.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar

MISSHAPEN = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a document raises whose values are of other kinds than expected, too large for a float, or too deep."""


@dataclass(frozen=True)
class Span:
    """A place in a text file: 1-based line and column, the length to underline, and the line itself."""

    path: Path
    line: int
    column: int
    length: int
    text: str


class CompressError(Exception):
    """Base class. ``cause`` says what is wrong, ``remedy`` what to do, ``where`` names the place in words.

    A class may have a ``usual_remedy``, for errors that come with none of their own.
    ``option`` is the option that is at fault, of a pass or of data, so that a recipe can point at it.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    usual_remedy: ClassVar[str] = ""

    def __init__(
        self, cause: str, *, remedy: str = "", where: str = "", span: Span | None = None, option: str = ""
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.remedy = remedy or self.usual_remedy
        self.where = where
        self.span = span
        self.option = option

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.cause}"]
        if self.span is not None:
            lines += _excerpt(self.span)
        if self.where:
            lines.append(f" --> {self.where}")
        if self.remedy:
            lines.append(f"help: {self.remedy}")
        return "\n".join(lines)


EXCERPT_WIDTH = 120


def _excerpt(span: Span) -> list[str]:
    gutter = " " * len(str(span.line))
    cut = max(0, span.column - EXCERPT_WIDTH // 2) if len(span.text) > EXCERPT_WIDTH else 0
    text = span.text[cut : cut + EXCERPT_WIDTH].rstrip()
    start = span.column - 1 - cut
    underline = " " * start + "^" * max(1, min(span.length, len(text) - start))
    return [
        f" --> {span.path}:{span.line}:{span.column}",
        f"{gutter} |",
        f"{span.line} | {text}".rstrip(),
        f"{gutter} | {underline}",
    ]


def nearest(name: str, valid: Iterable[str]) -> str:
    """A remedy for an unknown name: the nearest valid one, or all of them."""
    names = list(valid)
    matches = get_close_matches(name, names, n=1, cutoff=0.6)
    if matches:
        return f"did you mean `{matches[0]}`?"
    return f"it can be: {', '.join(names)}" if names else ""


def first_line(reason: BaseException) -> str:
    """The first line of what another library's error says, or its kind when it says nothing."""
    return next(iter(str(reason).splitlines()), "") or type(reason).__name__


def out_of_memory(reason: BaseException | None) -> bool:
    """Whether ``reason``, or what it came from, says that there is no memory left. PyTorch has no class for it."""
    if reason is None:
        return False
    known = isinstance(reason, MemoryError) or (isinstance(reason, OSError) and reason.errno == errno.ENOMEM)
    said = any(words in str(reason) for words in _NO_MEMORY)
    return known or said or out_of_memory(reason.__cause__ or reason.__context__)


_NO_MEMORY = (
    "can't allocate memory",
    "cannot allocate memory",
    "Cannot allocate memory",
    "can't start new thread",
    "std::bad_alloc",
    "could not create a primitive",  # all that oneDNN says
)


def memory_error() -> RunError:
    """What is said when memory has run out."""
    return RunError(
        "there is not enough memory",
        remedy="free some, or raise the limit that the program runs under; `run: {memory: 4GB}` bounds what it holds",
    )


def as_ours(error: Exception, remedy: str = "`--debug` shows where") -> CompressError:
    """``error``, or for one of another kind what a user is told of it."""
    if isinstance(error, CompressError):
        return error
    if out_of_memory(error):
        return memory_error()
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(
            "a path is longer than this system allows", where=str(error.filename), remedy="give a shorter one"
        )
    return InternalError(f"{type(error).__name__}: {error}", remedy=f"this is a bug; {remedy}")


class InternalError(CompressError):
    """The program is wrong."""

    code = "internal"
    exit_code = 2


class RunError(CompressError):
    """The machine does not give what a run needs."""

    code = "memory"
    exit_code = 2


class ExecutorError(CompressError):
    """Workers cannot be had, or die of their work."""

    code = "executor"
    exit_code = 2


class UsageError(CompressError):
    """The command line is wrong."""

    code = "usage"


class RecipeError(CompressError):
    """The recipe is wrong."""

    code = "recipe"


class SelectorError(CompressError):
    """A ``where`` selects nothing, or not what ``expect`` says."""

    code = "selector"


class OrderError(CompressError):
    """Passes stand in an order that cannot work."""

    code = "order"


class CaptureError(CompressError):
    """The model cannot be turned into a graph."""

    code = "capture"
    usual_remedy = "docs/families.md lists what is captured, and why other models are not"


class OpError(CompressError):
    """A graph operation was built with operands or attributes it does not accept."""

    code = "operation"
    exit_code = 2


class VerifyError(CompressError):
    """A graph broke one of its invariants."""

    code = "verify"
    exit_code = 2


class TextError(CompressError):
    """A graph text cannot be parsed."""

    code = "graph-text"


class CheckpointError(CompressError):
    """A checkpoint is damaged, incomplete, of a refused kind, or does not fit the model."""

    code = "checkpoint"


class DataError(CompressError):
    """Calibration or evaluation data cannot be used, or a metric does not apply to the model."""

    code = "data"


class PassError(CompressError):
    """A pass cannot do what the recipe asks of it on this model."""

    code = "pass"
    usual_remedy = "`compress-model passes NAME` lists other options; or leave the pass out for this model"


class TargetError(CompressError):
    """An output format cannot hold the graph."""

    code = "target"
    usual_remedy = "choose another format in `emit`, or leave out the pass that made it so"


class OutputError(CompressError):
    """The output cannot be written."""

    code = "output"
    exit_code = 2


class ParityError(CompressError):
    """What was written does not compute what the graph computes."""

    code = "parity"
    exit_code = 2
