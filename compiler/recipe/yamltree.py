"""YAML as a tree that knows its places: every key and value carries the span it was written at.

Recipes are small and are written by strangers, so the dialect is narrow: one UTF-8 document, no aliases, tags or
duplicate keys, bounded size and depth. Scalars follow the YAML 1.2 core schema (``yes`` is text).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)
from ruamel.yaml.reader import ReaderError

from compiler.errors import RecipeError, Span

MAX_BYTES = 1 << 20
MAX_DEPTH = 32

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Tree:
    """A YAML value. ``span`` is where it stands, ``key`` where the mapping key that holds it stands."""

    value: Scalar | tuple[Tree, ...] | dict[str, Tree]
    span: Span
    key: Span | None = None

    @property
    def items(self) -> dict[str, Tree]:
        """The entries of a mapping; nothing otherwise."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def place(self) -> Span:
        """The key when there is one, the value otherwise."""
        return self.key or self.span

    @property
    def kind(self) -> str:
        """What a user would call the value: ``a list``, ``the text `four```, ``the number 3``."""
        match self.value:
            case None:
                return "empty"
            case bool():
                return "`true`" if self.value else "`false`"
            case str():
                return f"the text `{self.value}`"
            case tuple():
                return "a list"
            case dict():
                return "a mapping"
            case _:
                return f"the number {self.value}"

    def plain(self) -> Any:
        """The value as Python data."""
        if isinstance(self.value, tuple):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {name: item.plain() for name, item in self.value.items()}
        return self.value

    def at(self, path: tuple[int | str, ...]) -> Tree:
        """The deepest value along ``path`` that exists."""
        tree = self
        for step in path:
            if isinstance(tree.value, dict) and step in tree.value:
                tree = tree.value[str(step)]
            elif isinstance(tree.value, tuple) and isinstance(step, int) and step < len(tree.value):
                tree = tree.value[step]
            else:
                break
        return tree


def read_tree(path: Path) -> Tree:
    """Parse the file at ``path``. Raises RecipeError for everything that is not one plain YAML document."""
    text = _text(path)
    lines = re.split(r"\r\n|[\r\n\x85\u2028\u2029]", text)
    for number, line in enumerate(lines, 1):
        indent = line[: len(line) - len(line.lstrip())]
        if "\t" in indent and line.strip():
            span = Span(path, number, indent.index("\t") + 1, 1, line.replace("\t", " "))
            raise RecipeError("a tab is used for indentation", span=span, remedy="YAML indents with spaces only")
    try:
        return _Builder(path, lines).document(text)
    except MarkedYAMLError as error:
        raise _syntax_error(path, lines, error) from error
    except ReaderError as error:
        raise _character_error(path, lines, text, error) from error


def _text(path: Path) -> str:
    if not path.exists():
        raise RecipeError(f"there is no recipe `{path}`", remedy="check the path")
    if not path.is_file():
        raise RecipeError(f"`{path}` is not a file", remedy="name the recipe's .yaml file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"`{path}` cannot be read: {error.strerror}", remedy="check that the file may be read"
        ) from error
    if len(content) > MAX_BYTES:
        raise RecipeError(
            f"`{path}` has {len(content)} bytes: that is no recipe", remedy="name the recipe's .yaml file"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8").split("\n")
        line = content.decode("utf-8", "replace").split("\n")[len(before) - 1]
        span = Span(path, len(before), len(before[-1]) + 1, 1, line)
        cause = f"byte {content[error.start]:#04x} is not UTF-8"
        raise RecipeError(cause, span=span, remedy="save the file as UTF-8") from error


def _syntax_error(path: Path, lines: list[str], error: MarkedYAMLError) -> RecipeError:
    """Points at the problem, or at what was left open when the problem is that the file ends."""
    mark = error.problem_mark
    if error.context_mark is not None and (
        mark is None or (mark.line >= len(lines) - 1 and "end" in str(error.problem))
    ):
        mark = error.context_mark
    problem = ", ".join(str(part) for part in (error.context, error.problem) if part)
    line = min(mark.line, len(lines) - 1) if mark else 0
    column = min(mark.column, len(lines[line])) + 1 if mark else 1
    return RecipeError(
        f"this is not valid YAML: {problem}",
        span=Span(path, line + 1, column, 1, lines[line]),
        remedy="look for an unclosed bracket or quote, a missing `: `, or wrong indentation",
    )


def _character_error(path: Path, lines: list[str], text: str, error: ReaderError) -> RecipeError:
    position = text.index(chr(error.character) if isinstance(error.character, int) else str(error.character))
    line = text.count("\n", 0, position)
    column = position - (text.rfind("\n", 0, position) + 1)
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in lines[line])
    return RecipeError(
        f"the character {text[position]!r} cannot stand in YAML",
        remedy="remove it",
        span=Span(path, line + 1, column + 1, 1, shown),
    )


class _Builder:
    """Builds a Tree from parser events, so that limits apply before anything grows."""

    def __init__(self, path: Path, lines: list[str]) -> None:
        self._path = path
        self._lines = lines

    def document(self, text: str) -> Tree:
        events = iter(YAML(typ="safe", pure=True).parse(text))
        documents = [self._first_value(event, events) for event in events if isinstance(event, DocumentStartEvent)]
        if not documents:
            whole = Span(self._path, 1, 1, 1, self._lines[0])
            raise RecipeError("the recipe is empty", span=whole, remedy="it needs at least `model:`")
        if len(documents) > 1:
            raise RecipeError(
                "a recipe is one YAML document", span=documents[1].span, remedy="remove the `---` between documents"
            )
        return documents[0]

    def _first_value(self, start: Any, events: Iterator[Any]) -> Tree:
        return self._value(next(events), events, 0)

    def _value(self, event: Any, events: Iterator[Any], depth: int) -> Tree:
        span = self._span(event)
        if event.anchor:
            raise RecipeError("anchors and aliases are not allowed in a recipe", span=span, remedy="write it out")
        if event.tag:
            raise RecipeError("tags are not allowed in a recipe", span=span, remedy="remove the `!` tag")
        if depth > MAX_DEPTH:
            raise RecipeError(
                f"values are nested more than {MAX_DEPTH} deep",
                span=span,
                remedy="no recipe needs that: look for stray brackets",
            )
        if isinstance(event, MappingStartEvent):
            return Tree(self._mapping(events, depth), span)
        if isinstance(event, SequenceStartEvent):
            return Tree(self._sequence(events, depth), span)
        return Tree(self._scalar(event, span), span)

    def _sequence(self, events: Iterator[Any], depth: int) -> tuple[Tree, ...]:
        items: list[Tree] = []
        while not isinstance(event := next(events), SequenceEndEvent):
            items.append(self._value(event, events, depth + 1))
        return tuple(items)

    def _mapping(self, events: Iterator[Any], depth: int) -> dict[str, Tree]:
        entries: dict[str, Tree] = {}
        while not isinstance(event := next(events), MappingEndEvent):
            key = self._value(event, events, depth + 1)
            value = self._value(next(events), events, depth + 1)
            if not isinstance(key.value, str):
                raise RecipeError(
                    f"a key must be text, not {key.kind}",
                    span=key.span,
                    remedy="a key is the name of a section, a pass or an option",
                )
            if key.value in entries:
                first = entries[key.value].place.line
                raise RecipeError(
                    f"`{key.value}` stands here twice", span=key.span, remedy=f"keep one; the first is on line {first}"
                )
            span = key.span if value.value is None else value.span  # nothing to point at but the key
            entries[key.value] = Tree(value.value, span, key.span)
        return entries

    def _scalar(self, event: Any, span: Span) -> Scalar:
        text = str(event.value)
        value = text if event.style else plain_scalar(text)
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise RecipeError(f"`{text}` is not a finite number", span=span, remedy="write a number")
        return value

    def _span(self, event: Any) -> Span:
        start, end = event.start_mark, event.end_mark
        line = min(start.line, len(self._lines) - 1)
        text = self._lines[line].rstrip()
        one_line = end.line == start.line and end.column > start.column
        stop = end.column if one_line and isinstance(event, ScalarEvent | AliasEvent) else len(text)
        return Span(self._path, line + 1, start.column + 1, max(1, stop - start.column), text)


def plain_scalar(text: str) -> Scalar:
    """The YAML 1.2 core value of an unquoted scalar."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    if re.fullmatch(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if re.fullmatch(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", text):
        return float(text)
    if re.fullmatch(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", text):
        return float(text.replace(".", ""))
    return text
