"""Reading one line of a graph text from left to right, with errors that point at the place."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compiler.errors import Span, TextError
from compiler.ir.types import DTYPES_BY_NAME, Dim, TensorType, canonical_dim

NAME = r"[\w.\-]+"
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')
_NUMBER = re.compile(r"-?(?:inf|nan|\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?!\w)")
_DIM_FUNCTIONS = {"floor", "ceiling", "Mod", "Max", "Min"}
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None, **DTYPES_BY_NAME}


@dataclass
class Cursor:
    """A line, and how far it has been read. ``index`` is what ``{i}`` stands for, if anything."""

    path: Path
    line: int
    text: str
    at: int = 0
    index: int | None = None

    def error(self, cause: str, remedy: str = "", *, start: int | None = None) -> TextError:
        """An error at ``start`` (or here); what was read since ``start`` is underlined."""
        column = self.at if start is None else start
        length = max(1, self.at - column)
        return TextError(cause, remedy=remedy, span=Span(self.path, self.line, column + 1, length, self.text))

    def skip(self) -> int:
        """Skip blanks; where the next token starts."""
        while self.text[self.at : self.at + 1] == " ":
            self.at += 1
        return self.at

    def done(self) -> bool:
        return self.skip() == len(self.text)

    def peek(self, literal: str) -> bool:
        return self.text.startswith(literal, self.skip())

    def starts(self, word: str) -> bool:
        """Whether ``word`` comes next, as a whole word."""
        return re.match(rf"{word}\b", self.text[self.skip() :]) is not None

    def accept(self, literal: str) -> bool:
        found = self.peek(literal)
        self.at += len(literal) * found
        return found

    def expect(self, literal: str) -> None:
        if not self.accept(literal):
            raise self.error(f"expected `{literal}`")

    def finish(self) -> None:
        """Nothing may follow."""
        if not self.done():
            raise self.error("the line should end here")

    def take(self, pattern: str | re.Pattern[str], what: str) -> str:
        """The text that ``pattern`` matches here."""
        found = re.compile(pattern).match(self.text, self.skip())
        if found is None:
            raise self.error(f"expected {what}")
        self.at = found.end()
        return found.group()

    def integer(self) -> int:
        return int(self.take(r"-?\d+", "a number"))

    def name(self) -> str:
        """A bare or quoted name."""
        return self.string() if self.peek('"') else self.take(NAME, "a name")

    def string(self) -> str:
        start = self.skip()
        quoted = self.take(_TEXT, "a text in double quotes")
        try:
            text: str = json.loads(quoted)
        except json.JSONDecodeError as reason:
            raise self.error(f"bad text: {reason.msg}", start=start) from reason
        return self.counted(text)

    def counted(self, text: str) -> str:
        """``text`` with its first ``{i}`` or ``{i+1}`` replaced by the number it stands for in this repetition."""
        if self.index is None:
            return text
        index = self.index
        return re.sub(r"\{i(?:\+(\d+))?\}", lambda found: str(index + int(found[1] or 0)), text, count=1)

    def value(self) -> Any:
        """A literal: text, number, list, ``true``, ``false``, ``none`` or a dtype."""
        if self.peek('"'):
            return self.string()
        if self.accept("["):
            return self.items(self.value, "]")
        number = _NUMBER.match(self.text, self.skip())
        if number:
            self.at = number.end()
            digits = number.group()
            return int(digits) if digits.lstrip("-").isdigit() else float(digits)
        word = self.take(r"\w+", "a value")
        if word not in _WORDS:
            raise self.error(f"`{word}` is no value", start=self.at - len(word))
        return _WORDS[word]

    def items(self, read: Any, closing: str) -> tuple[Any, ...]:
        """What ``read`` reads, separated by commas, up to ``closing``."""
        found: list[Any] = []
        while not self.accept(closing):
            if found:
                self.expect(",")
            found.append(read())
        return tuple(found)

    def dim(self) -> Dim:
        """A dim: everything up to a comma or closing bracket outside parentheses."""
        start, depth = self.skip(), 0
        while self.at < len(self.text) and (depth or self.text[self.at] not in ",]})"):
            depth += {"(": 1, ")": -1}.get(self.text[self.at], 0)
            self.at += 1
        text = self.text[start : self.at].strip()
        called = set(re.findall(r"(\w+) *\(", text))
        if not re.fullmatch(r"[\w+\-*/(), ]+", text) or not called <= _DIM_FUNCTIONS:
            raise self.error("expected a dim", start=start)
        try:
            return canonical_dim(text)
        except (ValueError, TypeError, SyntaxError, AttributeError) as reason:
            raise self.error(f"`{text}` is no dim", start=start) from reason

    def dims(self) -> tuple[Dim, ...]:
        self.expect("[")
        return self.items(self.dim, "]")

    def type(self) -> TensorType:
        """A tensor type such as ``f32[B,8]``."""
        start = self.skip()
        name = self.take(r"\w+", "a type")
        if name not in DTYPES_BY_NAME:
            raise self.error(f"unknown dtype `{name}`", f"one of {', '.join(DTYPES_BY_NAME)}", start=start)
        return TensorType(DTYPES_BY_NAME[name], self.dims())
