"""Python expressions as text with the binding strength of their outermost operator."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

ATOM, UNARY, PRODUCT, SUM, AND, OR, COMPARISON = 9, 7, 6, 5, 4, 3, 2
LIMIT = 120


@dataclass(frozen=True)
class Code:
    """``text`` is an expression; ``strength`` says how tightly its outermost operator binds."""

    text: str
    strength: int = ATOM

    def within(self, strength: int) -> str:
        """The text, in parentheses where an operator of ``strength`` would tear it apart."""
        return self.text if self.strength >= strength else f"({self.text})"

    @property
    def atom(self) -> str:
        """The text as something a method can be called on."""
        return self.within(ATOM)


def binary(left: Code, operator: str, right: Code, strength: int) -> Code:
    return Code(f"{left.within(strength)} {operator} {right.within(strength + 1)}", strength)


def number(value: float) -> str:
    """A number as Python spells it; whole floats keep their point."""
    if value == float("inf"):
        return 'float("inf")'
    return '-float("inf")' if value == -float("inf") else repr(value)


def call(indent: int, head: str, parts: list[str], tail: str = ")") -> list[str]:
    """``head`` + parts + ``tail`` on one line, or with a line for each part."""
    space = " " * indent
    line = f"{space}{head}{', '.join(parts)}{tail}"
    if len(line) <= LIMIT:
        return [line]
    return [f"{space}{head}", *(f"{space}    {part}," for part in parts), f"{space}{tail}"]


def wrapped(line: str) -> list[str]:
    """A statement in lines of at most 120 characters, as ruff lays it out: its last brackets are opened up."""
    if len(line) <= LIMIT or line.lstrip().startswith('"""'):
        return [line]
    if line.endswith(","):
        pieces = wrapped(line[:-1])
        return [*pieces[:-1], f"{pieces[-1]},"]
    space = line[: len(line) - len(line.lstrip())]
    opening = _last_bracket(line)
    if opening is None and not re.search(r"^\s*return |^[^(]* = ", line):
        return [f"{space}{term}" for term in _terms(line.strip())]
    if opening is None:
        head, _, value = line.partition("return " if line.lstrip().startswith("return ") else " = ")
        keyword = f"{head}return (" if line.lstrip().startswith("return ") else f"{head} = ("
        return [keyword, *wrapped(f"{space}    {value}"), f"{space})"]
    inner = line[opening + 1 : -1]
    whole = f"{space}    {inner}"
    clauses, arguments = _parts(inner, " for "), _parts(inner, ", ")
    listed = line[opening] in "[{" and not re.search(r"[\w\])]$", line[:opening]) and len(clauses) == 1 < len(arguments)
    if len(whole) <= LIMIT and not listed:
        return [line[: opening + 1], whole, f"{space}{line[-1]}"]
    parts = clauses if len(clauses) > 1 else arguments
    ends = "," if len(clauses) == 1 and len(arguments) > 1 else ""
    body = [piece for part in parts for piece in wrapped(f"{space}    {part}{ends}")]
    return [line[: opening + 1], *body, f"{space}{line[-1]}"]


def _last_bracket(line: str) -> int | None:
    """Where the brackets open that close at the end of ``line``."""
    if line[-1:] not in ")]}":
        return None
    depth = 0
    for index in range(len(line) - 1, -1, -1):
        depth += (line[index] in ")]}") - (line[index] in "([{")
        if depth == 0:
            return index
    return None


def _terms(text: str) -> list[str]:
    """``text`` cut in front of each operator that binds least, outside of brackets."""
    for operators in ((" + ", " - "), (" * ", " / ", " @ ")):
        cuts, depth = [0], 0
        for index, character in enumerate(text):
            depth += (character in "([{") - (character in ")]}")
            if depth == 0 and text[index : index + 3] in operators:
                cuts.append(index)
        if len(cuts) > 1:
            return [text[start:stop].strip() for start, stop in pairwise([*cuts, len(text)])]
    return [text]


def _parts(text: str, separator: str) -> list[str]:
    """``text`` cut at each ``separator`` outside of brackets; a comprehension keeps its keyword."""
    cuts, depth, start = list[str](), 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and index >= start and text.startswith(separator, index):
            cuts.append(text[start:index].strip(" ,"))
            start = index + (1 if separator == " for " else len(separator))
    return [*cuts, text[start:].strip(" ,")]


def names_in(text: str) -> set[str]:
    """Every identifier in a piece of code."""
    return set(re.findall(r"[A-Za-z_]\w*", text))


def camel(name: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in re.split(r"[^A-Za-z0-9]+", name))


def identifier(name: str) -> str:
    """``name`` with nothing in it that a Python name cannot have."""
    cleaned = re.sub(r"\W+", "_", name).strip("_")
    return f"_{cleaned}" if cleaned[:1].isdigit() else cleaned
