"""Write weight expressions as sharded safetensors files, in bounded memory, so that a killed run can go on.

Files get their header and their full size first; then every tensor is computed and written to its place. Space is
reserved before any work is done. The bytes depend on the expressions alone, never on timing or interruption.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compiler.errors import CheckpointError, OutputError
from compiler.ir.types import TensorType
from compiler.weights.evaluate import evaluate
from compiler.weights.expr import Expr, loads
from compiler.weights.journal import Journal
from compiler.weights.layout import INDEX_NAME, SHARD_BYTES, Shard, index_text, layout, layout_digest
from compiler.weights.source import Source
from compiler.weights.tasks import Piece, Task, plan
from compiler.weights.tensorfile import row_bytes

BUDGET = 64 << 20  # small, so that memory is reused: fresh pages cost more time than the arithmetic on them
SAFE_BYTES = 256 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WrittenFile:
    """A finished file and its size in bytes."""

    path: Path
    size: int


def write(
    tensors: Mapping[str, Expr],
    sources: Mapping[str, Source],
    directory: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    journal: Path | None = None,
    budget: int = BUDGET,
    threads: int = 2,
    safe_bytes: int = SAFE_BYTES,
    on_progress: Progress | None = None,
    shards: Sequence[Shard] | None = None,
) -> list[WrittenFile]:
    """Compute every tensor and write model.safetensors, or shards with an index, into ``directory``.

    ``shards`` are files of another format that together hold all ``tensors``.
    ``budget`` bounds the bytes that all ``threads`` together hold, as far as single rows allow. ``journal`` (a file
    outside ``directory``) records what is done, every ``safe_bytes``: a later call with the same tensors and sources
    goes on from there.
    ``on_progress`` is called with (bytes done, bytes in all), first for what an earlier run has left.

    Raises CheckpointError when a source is damaged or holds NaN or infinite values, OutputError when a result is
    not finite or the files cannot be written; what is finished stays and is reused.
    """
    shards = layout(tensors, shard_bytes) if shards is None else shards
    record = Journal(journal, _job_key(shards, sources))
    with explained(directory):
        files = [_File(shard, directory) for shard in shards]
        _check_space(files, directory)
        record.begin(name for file in files if not file.fresh for name in file.shard.tensors)
        for file in files:
            file.prepare()
        writer = _Writer(files, sources, record, safe_bytes, on_progress or _silent)
        with _single_threaded_torch():
            writer.run(plan(writer.pending(tensors), budget // threads), threads)
        return [*(file.finish() for file in files), *_write_index(shards, directory)]


class _File:
    """An output file, open only while it is used: there may be more than a process may have open.

    ``fresh`` says that nothing in it can be reused: it did not exist, or was another one.
    """

    def __init__(self, shard: Shard, directory: Path) -> None:
        self.shard = shard
        self.path = directory / shard.name
        with self._open() as descriptor:
            same_size = os.fstat(descriptor).st_size == shard.size
            self.fresh = not same_size or os.pread(descriptor, len(shard.header), 0) != shard.header

    @contextmanager
    def _open(self) -> Generator[int]:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    @property
    def missing(self) -> int:
        """Bytes of the file that have no place on the disk yet."""
        return max(0, self.shard.size - self.path.stat().st_blocks * 512)

    def prepare(self) -> None:
        """Write the header and reserve the space, so that a full disk is known before any work is done."""
        with self._open() as descriptor:
            if self.fresh:
                os.ftruncate(descriptor, self.shard.size)
                _write_at(descriptor, memoryview(self.shard.header), 0)
            _reserve(descriptor, self.shard.size)

    def put(self, piece: Piece, value: Tensor) -> None:
        """Write the rows that ``piece`` stands for."""
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
        skipped = piece.start * row_bytes(piece.expr.type) if piece.start else 0
        with self._open() as descriptor:
            _write_at(descriptor, data, self.shard.offsets[piece.name] + skipped)

    def sync(self) -> None:
        with self._open() as descriptor:
            os.fdatasync(descriptor)

    def finish(self) -> WrittenFile:
        with self._open() as descriptor:
            os.fsync(descriptor)
        return WrittenFile(self.path, self.shard.size)


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
                remedy="the checkpoint is damaged: fetch it again",
            )
        return value


class _Writer:
    """Runs tasks and records what is finished."""

    def __init__(
        self,
        files: Sequence[_File],
        sources: Mapping[str, Source],
        record: Journal,
        safe_bytes: int,
        on_progress: Progress,
    ) -> None:
        self._file_of = {name: file for file in files for name in file.shard.tensors}
        self._files = files
        self._sources = {name: _FiniteSource(name, source) for name, source in sources.items()}
        self._record = record
        self._safe_bytes = safe_bytes
        self._on_progress = on_progress
        self._total = sum(file.shard.tensor_bytes for file in files)

    def pending(self, tensors: Mapping[str, Expr]) -> dict[str, Expr]:
        """The tensors that are not finished yet."""
        return {name: expr for name, expr in tensors.items() if name not in self._record.finished}

    def run(self, tasks: Sequence[Task], threads: int) -> None:
        done = self._total - sum(task.nbytes for task in tasks)
        self._on_progress(done, self._total)
        finished: list[str] = []
        unsynced = 0
        for task in _in_order(self._do, tasks, threads):
            finished += task.completes
            done, unsynced = done + task.nbytes, unsynced + task.nbytes
            self._on_progress(done, self._total)
            if unsynced >= self._safe_bytes:
                self._checkpoint(finished)
                finished, unsynced = [], 0
        self._checkpoint(finished)

    def _checkpoint(self, finished: Sequence[str]) -> None:
        """Make sure that finished tensors survive a loss of power, then record them."""
        for file in self._files:
            file.sync()
        self._record.add(finished)

    def _do(self, task: Task) -> Task:
        values = evaluate([piece.expr for piece in task.pieces], self._sources)
        for piece, value in zip(task.pieces, values, strict=True):
            self._check(piece, value)
            self._file_of[piece.name].put(piece, value)
        return task

    def _check(self, piece: Piece, value: Tensor) -> None:
        found = TensorType(value.dtype, tuple(value.shape))
        if found != piece.expr.type:
            raise OutputError(f"tensor {piece.name} came out as {found} instead of {piece.expr.type}")
        if not _finite(value):
            raise OutputError(
                f"computing tensor {piece.name} gave NaN or infinite values, its inputs are finite",
                remedy=f"{piece.expr.type.dtype} may be too narrow for it",
            )


def _in_order(do: Callable[[Task], Task], tasks: Sequence[Task], threads: int) -> Iterator[Task]:
    """Run ``do`` on all tasks; yield each as it and all before it are finished."""
    if threads == 1:
        yield from map(do, tasks)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(do, tasks)


@contextmanager
def _single_threaded_torch() -> Generator[None]:
    """One thread for each task: tasks run side by side already, and results cannot depend on a number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _finite(value: Tensor) -> bool:
    if value.is_complex():
        return _finite(torch.view_as_real(value))
    if not value.dtype.is_floating_point or not value.numel():
        return True
    wide = value.float() if value.dtype.itemsize == 1 else value
    low, high = wide.aminmax()  # propagates NaN, and needs no memory
    return bool(low.isfinite() and high.isfinite())


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], position + done)


def _check_space(files: Sequence[_File], directory: Path) -> None:
    needed = sum(file.missing for file in files)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OutputError(
            f"the disk is too full: {needed:,} bytes are needed, {free:,} are free",
            where=str(directory),
            remedy="free some space and run again: what is finished is reused",
        )


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as reason:
        if reason.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise


def _write_index(shards: Sequence[Shard], directory: Path) -> list[WrittenFile]:
    if len(shards) == 1:
        return []
    path = directory / INDEX_NAME
    path.write_text(index_text(shards))
    return [WrittenFile(path, path.stat().st_size)]


def _job_key(shards: Sequence[Shard], sources: Mapping[str, Source]) -> str:
    needed = {read.attr("source") for shard in shards for read in loads(list(shard.tensors.values()))}
    return ":".join([layout_digest(shards), *(sources[name].identity() for name in sorted(needed & sources.keys()))])


def _silent(done: int, total: int) -> None:
    pass


@contextmanager
def explained(directory: Path) -> Generator[None]:
    """Turn errors of the operating system, while ``directory`` is written, into OutputError."""
    try:
        yield
    except OSError as reason:
        raise OutputError(
            f"cannot write: {reason.strerror}",
            where=str(reason.filename or directory),
            remedy="free some space and run again: what is finished is reused"
            if reason.errno in _FULL
            else "choose a directory that you may write to",
        ) from reason
