"""The header of a GGUF file, written; ``compiler/weights/gguf_header.py`` reads it and says what it holds."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from compiler.weights.layout import Shard

VERSION = 3
ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, TEXT, LIST = 4, 5, 6, 7, 8, 9

Metadata = Mapping[str, Any]
"""Values are bool, int (uint32), float (float32), str, and lists of one of float, int (int32) and str."""


@dataclass(frozen=True)
class GgufFile(Shard):
    """One file. ``formats`` has the block format and the shape, slowest axis first, of every tensor."""

    metadata: Metadata
    formats: Mapping[str, tuple[int, tuple[int, ...]]]

    @cached_property
    def header(self) -> bytes:
        records = b"".join(
            _text(name) + _record(*self.formats[name], offset) for name, offset in self._relative.items()
        )
        entries = b"".join(_text(key) + _value(value) for key, value in self.metadata.items())
        head = b"GGUF" + struct.pack("<IQQ", VERSION, len(self.tensors), len(self.metadata)) + entries + records
        return head + bytes(-len(head) % ALIGNMENT)

    @cached_property
    def offsets(self) -> Mapping[str, int]:
        return {name: len(self.header) + offset for name, offset in self._relative.items()}

    @property
    def size(self) -> int:
        return len(self.header) + sum(map(_aligned, self._sizes.values()))

    @property
    def _sizes(self) -> Mapping[str, int]:
        return {name: expr.type.nbytes for name, expr in self.tensors.items()}

    @cached_property
    def _relative(self) -> Mapping[str, int]:
        """Positions of tensors behind the header; each begins at a multiple of the alignment."""
        position, found = 0, dict[str, int]()
        for name, size in self._sizes.items():
            found[name] = position
            position += _aligned(size)
        return found


def _aligned(size: int) -> int:
    return size + -size % ALIGNMENT


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _record(number: int, shape: Sequence[int], offset: int) -> bytes:
    return struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, offset)


def _value(value: Any) -> bytes:
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", TEXT) + _text(value)
        case _:
            return struct.pack("<I", LIST) + _items(list(value))


def _items(values: list[Any]) -> bytes:
    if values and isinstance(values[0], str):
        return struct.pack("<IQ", TEXT, len(values)) + b"".join(map(_text, values))
    kind, code = (FLOAT32, "f") if values and isinstance(values[0], float) else (INT32, "i")
    return struct.pack(f"<IQ{len(values)}{code}", kind, len(values), *values)
