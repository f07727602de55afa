"""The safetensors file: its header is read, checked against the file, and written here.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes. Every claim of the
header is checked before anything is allocated for it. Tensors are read with ``pread`` into fresh memory: mapped
pages would count as resident memory, and a file truncated under a mapping kills the process.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from compiler.errors import CheckpointError
from compiler.ir.types import TensorType

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_CODES: dict[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000
DOCUMENT_LIMIT = 500_000_000
"""Bytes of a document beside the weights: the largest tokenizers have a tenth of that."""
_ALIGNMENT = 8
_READ_CHUNK = 1 << 26


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: ``start`` and ``stop`` are byte positions in the file."""

    type: TensorType
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, in the order of their bytes.

    Raises CheckpointError, naming the file and the tensor, when the header is damaged or claims what the file
    cannot hold.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(file.read(8), size, path)
            text = file.read(length)
    except OSError as reason:
        cause = f"cannot read {path.name}: {reason.strerror}"
        raise CheckpointError(cause, where=str(path), remedy="check that the file is there and may be read") from reason
    entries = parse_json(text, path)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in cast("Any", metadata).values()):
        raise _damaged(path, "its metadata is not an object of texts")
    base = 8 + length
    stored = {name: _stored(name, entry, base, path) for name, entry in entries.items()}
    ordered = dict(sorted(stored.items(), key=lambda item: (item[1].start, item[1].stop)))
    _check_coverage(ordered, base, size, path)
    return ordered


def header_bytes(types: Mapping[str, TensorType]) -> bytes:
    """The length and header of a file holding ``types`` one after the other, in order, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, type in types.items():
        stop = position + type.nbytes
        entries[name] = {"dtype": DTYPE_CODES[type.dtype], "shape": type.static_shape, "data_offsets": (position, stop)}
        position = stop
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def read_bytes(path: Path, start: int, stop: int) -> Tensor:
    """The bytes [start, stop) of a file as uint8. Raises CheckpointError when the file ends before."""
    buffer = torch.empty(stop - start, dtype=torch.uint8)
    view = buffer.numpy().data
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            _fill(view, descriptor, start, path)
        finally:
            os.close(descriptor)
    except OSError as reason:
        cause = f"cannot read {path.name}: {reason.strerror}"
        raise CheckpointError(cause, where=str(path), remedy="check that the file is there and may be read") from reason
    return buffer


def read_tensor(path: Path, stored: Stored) -> Tensor:
    """A whole tensor of a file, in fresh memory."""
    return read_bytes(path, stored.start, stored.stop).view(stored.type.dtype).reshape(stored.type.static_shape)


def read_rows(path: Path, stored: Stored, start: int, stop: int) -> Tensor:
    """The rows [start, stop) of a tensor of a file, in fresh memory."""
    width = row_bytes(stored.type)
    data = read_bytes(path, stored.start + start * width, stored.start + stop * width)
    return data.view(stored.type.dtype).reshape(stop - start, *stored.type.static_shape[1:])


def open_regular(path: Path) -> IO[bytes]:
    """Open a file to read it. Raises CheckpointError for a pipe or a device, which might wait or go on for ever."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointError(f"{path.name} is no regular file", where=str(path), remedy="put the file itself there")
    return path.open("rb")


def read_document(path: Path) -> bytes:
    """The bytes of a small file beside the weights.

    Raises CheckpointError when it is no regular file (a pipe or a device may never end) or larger than
    ``DOCUMENT_LIMIT``, OSError when it cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > DOCUMENT_LIMIT:
            cause = f"{path.name} has {size} bytes, more than the {DOCUMENT_LIMIT} that are allowed"
            raise CheckpointError(cause, where=str(path), remedy="fetch the file again: no model needs that")
        return file.read()


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError for anything else, and for a key that stands in it twice."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as reason:
        raise _damaged(path, f"its JSON cannot be read: {reason}") from reason
    if not isinstance(value, dict):
        raise _damaged(path, "its JSON is not an object")
    return cast(dict[str, Any], value)


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key} stands in it twice")
        result[key] = value
    return result


def _fill(view: memoryview, descriptor: int, start: int, path: Path) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done : done + _READ_CHUNK]], start + done)
        if not count:
            raise _damaged(path, f"it ends at byte {start + done}, inside a tensor")
        done += count


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path.name} is damaged: {reason}", where=str(path), remedy="fetch the file again")


def _header_length(prefix: bytes, size: int, path: Path) -> int:
    if len(prefix) < 8:
        raise _damaged(path, f"it has only {len(prefix)} bytes")
    (length,) = struct.unpack("<Q", prefix)
    if length > size - 8:
        raise _damaged(path, f"its header claims {length} bytes, the file has {size}")
    if length > HEADER_LIMIT:
        raise _damaged(path, f"its header claims {length} bytes, more than the {HEADER_LIMIT} that are allowed")
    return length


def _stored(name: str, entry: Any, base: int, path: Path) -> Stored:
    try:
        code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as reason:
        raise _damaged(path, f"the entry of tensor {name} is incomplete") from reason
    if not all(_is_count(number) for number in (*_as_list(shape, name, path), start, stop)) or start > stop:
        raise _damaged(path, f"tensor {name} has the shape {shape} and the offsets [{start}, {stop}]")
    if not isinstance(code, str) or code not in DTYPES:
        cause = f"tensor {name} has the unsupported dtype {code}"
        raise CheckpointError(cause, where=str(path), remedy=f"convert it to one of {', '.join(DTYPES)}")
    type = TensorType(DTYPES[code], tuple(shape))
    if type.nbytes != stop - start:
        raise _damaged(path, f"tensor {name} is {type}, {type.nbytes} bytes, but its offsets span {stop - start}")
    return Stored(type, base + start, base + stop)


def _as_list(shape: Any, name: str, path: Path) -> list[Any]:
    if not isinstance(shape, list):
        raise _damaged(path, f"tensor {name} has the shape {shape!r}")
    return cast(list[Any], shape)


def _is_count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _check_coverage(ordered: Mapping[str, Stored], base: int, size: int, path: Path) -> None:
    """Tensors lie one after the other, without overlap or hole, up to the end of the file."""
    position, previous = base, "the header"
    for name, stored in ordered.items():
        if stored.start < position:
            raise _damaged(path, f"tensor {name} overlaps {previous}")
        if stored.start > position:
            raise _damaged(path, f"{stored.start - position} bytes between {previous} and tensor {name} are unclaimed")
        position, previous = stored.stop, name
    if position > size:
        raise _damaged(path, f"it is truncated: its tensors end at byte {position}, the file at {size}")
    if position < size:
        raise _damaged(path, f"{size - position} bytes after tensor {previous} are unclaimed")


def row_bytes(type: TensorType) -> int:
    """Bytes of one row (one index of the first axis) of a tensor."""
    return math.prod(type.static_shape[1:]) * type.dtype.itemsize
