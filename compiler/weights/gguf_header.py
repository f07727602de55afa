"""The header of a GGUF file: where each tensor lies, checked against the file before anything is read from it.

Layout (little-endian, version 2 or 3): magic, version, tensor count, metadata count; the metadata (key, type, value);
a record per tensor (name, dims fastest first, block format, offset); padding to the alignment; the tensors.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from compiler.errors import CheckpointError
from compiler.weights.tensorfile import open_regular

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_DIM_LIMIT = 4
_DEPTH_LIMIT = 4


@dataclass(frozen=True)
class Blocks:
    """A stored tensor: its shape (slowest axis first), block format, and byte positions in the file."""

    shape: tuple[int, ...]
    format: int
    start: int
    stop: int


@dataclass(frozen=True)
class GgufHeader:
    """The metadata and the tensors of a GGUF file."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, Blocks]


def read_gguf_header(path: Path) -> GgufHeader:
    """Raises CheckpointError, naming what is wrong, when the file is no GGUF file or claims what it cannot hold."""
    try:
        with open_regular(path) as file:
            return _Reader(file, path).header()
    except OSError as reason:
        cause = f"cannot read {path.name}: {reason.strerror}"
        raise CheckpointError(cause, where=str(path), remedy="check that the file is there and may be read") from reason


class _Reader:
    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path
        self._size = os.fstat(file.fileno()).st_size

    def header(self) -> GgufHeader:
        if self._bytes(4) != b"GGUF":
            raise self._damaged("it does not begin with GGUF")
        version, tensor_count, entry_count = self._unpack("IQQ")
        if version not in (2, 3):
            raise CheckpointError(
                f"{self._path.name} is GGUF version {version}; 2 and 3 can be read",
                where=str(self._path),
                remedy="convert it with a current llama.cpp",
            )
        metadata = dict(self._entry() for _ in range(self._plausible(entry_count)))
        records = [self._record() for _ in range(self._plausible(tensor_count))]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"its alignment is {alignment}")
        base = math.ceil(self._file.tell() / alignment) * alignment
        return GgufHeader(metadata, self._placed(records, base))

    def _entry(self) -> tuple[str, Any]:
        key = self._text()
        (kind,) = self._unpack("I")
        return key, self._value(kind)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _LIST:
            if depth == _DEPTH_LIMIT:
                raise self._damaged(f"its metadata has lists in lists, more than {_DEPTH_LIMIT} deep")
            item, count = self._unpack("IQ")
            return self._list(item, self._plausible(count), depth + 1)
        if kind not in _SCALARS:
            raise self._damaged(f"its metadata has the unknown type {kind}")
        return self._unpack(_SCALARS[kind])[0]

    def _list(self, item: int, count: int, depth: int) -> list[Any]:
        if item in _SCALARS:
            return list(self._unpack(f"{count}{_SCALARS[item]}"))
        return [self._value(item, depth) for _ in range(count)]

    def _record(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._text()
        (rank,) = self._unpack("I")
        if rank > _DIM_LIMIT:
            raise self._damaged(f"tensor {name} has {rank} dims")
        *dims, format, offset = self._unpack(f"{rank}QIQ")
        return name, tuple(reversed(dims)), format, offset

    def _placed(self, records: list[tuple[str, tuple[int, ...], int, int]], base: int) -> dict[str, Blocks]:
        placed: dict[str, Blocks] = {}
        for name, shape, format, offset in records:
            if name in placed:
                raise self._damaged(f"tensor {name} stands in it twice")
            start = base + offset
            placed[name] = Blocks(shape, format, start, start + self._block_bytes(name, shape, format))
        end, previous = base, "the header"
        for name, blocks in sorted(placed.items(), key=lambda item: item[1].start):
            if blocks.start < end:
                raise self._damaged(f"tensor {name} overlaps {previous}")
            if blocks.stop > self._size:
                raise self._damaged(
                    f"it is truncated: tensor {name} ends at byte {blocks.stop}, the file at {self._size}"
                )
            end, previous = blocks.stop, name
        return placed

    def _block_bytes(self, name: str, shape: tuple[int, ...], format: int) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            per_block, size = GGML_QUANT_SIZES[GGMLQuantizationType(format)]
        except (ValueError, KeyError) as reason:
            raise CheckpointError(
                f"tensor {name} has the unknown block format {format}",
                where=str(self._path),
                remedy="fetch the file again, or take one in another quantisation",
            ) from reason
        if (shape[-1] if shape else 1) % per_block:
            raise self._damaged(f"tensor {name} of shape {list(shape)} does not divide into blocks of {per_block}")
        return math.prod(shape) // per_block * size

    def _plausible(self, count: int) -> int:
        """A count of things that take a byte each at least."""
        if count > self._size:
            raise self._damaged(f"it claims {count} entries, but has {self._size} bytes")
        return count

    def _text(self) -> str:
        (length,) = self._unpack("Q")
        return self._bytes(self._plausible(length)).decode(errors="replace")

    def _unpack(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack("<" + layout, self._bytes(struct.calcsize("<" + layout)))

    def _bytes(self, count: int) -> bytes:
        if count > self._size:
            raise self._damaged(f"it claims {count} bytes, but has {self._size}")
        data = self._file.read(count)
        if len(data) < count:
            raise self._damaged("it ends inside its header")
        return data

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path.name} is damaged: {reason}", where=str(self._path), remedy="fetch the file again"
        )


def check_rotary(header: GgufHeader, path: Path) -> None:
    """Raises CheckpointError for scaled rotary embedding, which transformers' reader of GGUF files leaves out."""
    kind = header.metadata.get(f"{header.metadata.get('general.architecture')}.rope.scaling.type", "none")
    if kind != "none" or any(name.startswith("rope_f") for name in header.tensors):
        raise CheckpointError(
            f"transformers does not read the scaled rotary embedding of {path.name}",
            where=str(path),
            remedy="start from the original safetensors checkpoint",
        )
