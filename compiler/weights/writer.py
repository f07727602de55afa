"""Write weight expressions as sharded safetensors files, in bounded memory, so that a killed run can go on.

Files get their header and their full size first; then every tensor is computed and written to its place. Space is
reserved before any work is done. The bytes depend on the expressions alone, never on timing or interruption.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from compiler.errors import OutputError
from compiler.executor import Executor, Local, in_order
from compiler.weights.expr import Expr, loads
from compiler.weights.journal import Journal
from compiler.weights.layout import INDEX_NAME, SHARD_BYTES, Shard, index_text, layout, layout_digest
from compiler.weights.make import Maker, Place, write_at
from compiler.weights.source import Source
from compiler.weights.tasks import Task, plan

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
    executor: Executor = Local(),  # noqa: B008
    safe_bytes: int = SAFE_BYTES,
    on_progress: Progress | None = None,
    shards: Sequence[Shard] | None = None,
) -> list[WrittenFile]:
    """Compute every tensor and write model.safetensors, or shards with an index, into ``directory``.

    ``shards`` are files of another format that together hold all ``tensors``.
    ``budget`` bounds the bytes that all workers of ``executor`` together hold, as far as single rows allow. ``journal``
    (a file outside ``directory``) records what is done, every ``safe_bytes``: a later call with the same tensors and
    sources goes on from there.
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
        pending = {name: expr for name, expr in tensors.items() if name not in record.finished}
        tasks = plan(pending, budget // executor.workers)
        with _single_threaded_torch():
            _Writer(files, record, safe_bytes, on_progress or _silent).run(
                tasks, Maker(_places(files), sources), executor
            )
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
                write_at(descriptor, memoryview(self.shard.header), 0)
            _reserve(descriptor, self.shard.size)

    def sync(self) -> None:
        with self._open() as descriptor:
            os.fdatasync(descriptor)

    def finish(self) -> WrittenFile:
        with self._open() as descriptor:
            os.fsync(descriptor)
        return WrittenFile(self.path, self.shard.size)


class _Writer:
    """Has tasks done and records what is finished."""

    def __init__(self, files: Sequence[_File], record: Journal, safe_bytes: int, on_progress: Progress) -> None:
        self._files = files
        self._record = record
        self._safe_bytes = safe_bytes
        self._on_progress = on_progress
        self._total = sum(file.shard.tensor_bytes for file in files)

    def run(self, tasks: Sequence[Task], make: Maker, executor: Executor) -> None:
        done = self._total - sum(task.nbytes for task in tasks)
        self._on_progress(done, self._total)
        finished: list[str] = []
        unsynced = 0
        with closing(in_order(executor, make, tasks)) as made:
            for task, _ in zip(tasks, made, strict=True):
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


def _places(files: Sequence[_File]) -> dict[str, Place]:
    return {name: Place(file.path, offset) for file in files for name, offset in file.shard.offsets.items()}


@contextmanager
def _single_threaded_torch() -> Generator[None]:
    """One thread for each task: tasks run side by side already, and results cannot depend on a number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
