"""Make tensors and put them into their places: what is done by a worker, wherever it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compiler.errors import CheckpointError, OutputError
from compiler.ir.types import TensorType
from compiler.weights.evaluate import evaluate
from compiler.weights.source import Source
from compiler.weights.tasks import Piece, Task
from compiler.weights.tensorfile import row_bytes


@dataclass(frozen=True)
class Place:
    """Where a tensor is written: its first byte in a file that has its full size already."""

    path: Path
    offset: int


class Maker:
    """Does tasks. Doing one twice is doing it once: the same bytes go to the same places."""

    def __init__(self, places: Mapping[str, Place], sources: Mapping[str, Source]) -> None:
        self._places = places
        self._sources = {name: _FiniteSource(name, source) for name, source in sources.items()}

    def __call__(self, task: Task) -> None:
        if torch.get_num_threads() != 1:  # a worker in another process
            torch.set_num_threads(1)
        values = evaluate([piece.expr for piece in task.pieces], self._sources)
        for piece, value in zip(task.pieces, values, strict=True):
            _check(piece, value)
            self._put(piece, value)

    def _put(self, piece: Piece, value: Tensor) -> None:
        """Write the rows that ``piece`` stands for. The file is open only meanwhile: there may be thousands."""
        place = self._places[piece.name]
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        skipped = piece.start * row_bytes(piece.expr.type) if piece.start else 0
        descriptor = os.open(place.path, os.O_RDWR)
        try:
            write_at(descriptor, data, place.offset + skipped)
        finally:
            os.close(descriptor)


class _FiniteSource:
    """A source whose tensors are looked at when they are read: rounding to integers would hide a NaN for good."""

    def __init__(self, name: str, source: Source) -> None:
        self._name = name
        self._source = source
        self.types = source.types
        self.fingerprint = source.fingerprint
        self.identity = source.identity

    def read(self, key: str) -> Tensor:
        return self._checked(key, self._source.read(key))

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._checked(key, self._source.read_rows(key, start, stop))

    def _checked(self, key: str, value: Tensor) -> Tensor:
        if not _finite(value):
            raise CheckpointError(
                f"tensor {key} holds NaN or infinite values",
                where=self._name,
                remedy="a pass computed it: check its calibration data, or leave the pass out"
                if self._name == "spill"
                else "the checkpoint is damaged: fetch it again",
            )
        return value


def _check(piece: Piece, value: Tensor) -> None:
    found = TensorType(value.dtype, tuple(value.shape))
    if found != piece.expr.type:
        raise OutputError(f"tensor {piece.name} came out as {found} instead of {piece.expr.type}")
    if not _finite(value):
        raise OutputError(
            f"computing tensor {piece.name} gave NaN or infinite values, its inputs are finite",
            remedy=f"{piece.expr.type.dtype} may be too narrow for it",
        )


def _finite(value: Tensor) -> bool:
    if value.is_complex():
        return _finite(torch.view_as_real(value))
    if not value.dtype.is_floating_point or not value.numel():
        return True
    wide = value.float() if value.dtype.itemsize == 1 else value
    low, high = wide.aminmax()  # propagates NaN, and needs no memory
    return bool(low.isfinite() and high.isfinite())


def write_at(descriptor: int, data: memoryview, position: int) -> None:
    """Write all of ``data`` from the byte ``position`` on."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)
