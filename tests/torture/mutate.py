"""Damage: to bytes, to text, and to documents, where it is likely to be believed."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from typing import Any

BELIEVABLE: tuple[Any, ...] = (
    *(None, True, False, "", "x", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, [], {}, [[]], {"a": 1}),
    *(0, 1, -1, 2, 3, 7, 64, 255, 2**31 - 1, 2**31, 2**40, 2**60, 2**63, 2**64, 10**30, 10**400),
    *(0.5, -0.0, 1e-30, 1e308, float("inf"), float("nan")),
)

MARKS = ("{", "[", "]", "}", ":", "&a ", "*a", "!!python/object:os.system ", "\t", "\n", "#", "'", "- ")


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """One to four injuries anywhere in ``data``."""
    for _ in range(chance.randint(1, 4)):
        data = chance.choice(_INJURIES)(data, chance)
    return data


def damage_text(text: str, chance: random.Random) -> bytes:
    """Words and numbers of ``text`` exchanged for others, lines moved, or its bytes injured."""
    if chance.random() < 0.3:
        return damage_bytes(text.encode(), chance)
    for _ in range(chance.randint(1, 3)):
        text = chance.choice(_EDITS)(text, chance)
    return text.encode("utf-8", "surrogatepass")


def damage_json(document: Any, chance: random.Random) -> bytes:
    """One to three values of ``document`` exchanged, lost, doubled or wrapped; sometimes its text injured."""
    document = copy.deepcopy(document)
    for _ in range(chance.randint(1, 3)):
        document = _damage_value(document, chance)
    text = json.dumps(document)
    return damage_bytes(text.encode(), chance) if chance.random() < 0.2 else text.encode()


def _damage_value(document: Any, chance: random.Random) -> Any:
    places = list(_places(document))
    if not places:
        return chance.choice(BELIEVABLE)
    holder, key = chance.choice(places)
    match chance.randrange(6):
        case 0:
            del holder[key]
        case 1:
            other, name = chance.choice(places)
            holder[key] = copy.deepcopy(other[name])
        case 2:
            holder[key] = chance.choice(([holder[key]], {"a": holder[key]}, str(holder[key])))
        case 3 if isinstance(holder[key], int | float):
            holder[key] = chance.choice((-holder[key], holder[key] + 1, holder[key] * 2, holder[key] - 1))
        case _:
            holder[key] = chance.choice(BELIEVABLE)
    return document


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a document that holds a value, as what holds it and the key or index there."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *_places(value[key]))]


def _cut(data: bytes, chance: random.Random) -> tuple[int, int]:
    start = chance.randint(0, len(data))
    return start, min(len(data), start + chance.choice((1, 2, 8, 64, len(data))))


def _flip(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return data
    place = chance.randrange(min(len(data), chance.choice((8, 200, len(data)))))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def _lose(data: bytes, chance: random.Random) -> bytes:
    start, stop = _cut(data, chance)
    return data[:start] + data[stop:]


def _double(data: bytes, chance: random.Random) -> bytes:
    start, stop = _cut(data, chance)
    return data[:stop] + data[start:]


def _fill(data: bytes, chance: random.Random) -> bytes:
    start, stop = _cut(data, chance)
    return data[:start] + bytes([chance.choice((0, 0xFF, 0x7F, 0x20))]) * (stop - start) + data[stop:]


def _truncate(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randint(0, len(data))]


def _append(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.choice((1, 8, 100)))


_INJURIES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _lose, _double, _fill, _truncate, _append)


def _exchange(text: str, chance: random.Random) -> str:
    """Another word in the place of one."""
    words = list(re.finditer(r"[\w.%-]+", text))
    if not words:
        return text
    word, value = chance.choice(words), chance.choice(BELIEVABLE)
    new = chance.choice(words)[0] if chance.random() < 0.4 else value if isinstance(value, str) else repr(value)
    return text[: word.start()] + new + text[word.end() :]


def _insert(text: str, chance: random.Random) -> str:
    place = chance.randint(0, len(text))
    return text[:place] + chance.choice(MARKS) + text[place:]


def _move(text: str, chance: random.Random) -> str:
    lines = text.splitlines(keepends=True)
    chance.shuffle(lines)
    return "".join(lines)


_EDITS: tuple[Callable[[str, random.Random], str], ...] = (_exchange, _exchange, _insert, _move)
