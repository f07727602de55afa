"""The output directory: it either is complete under its name or does not exist there.

All work happens in a hidden directory beside the target, named after the target and the job, so that the same job
run again finds what an interrupted run has left. At the end it is renamed in one step.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from compiler.errors import OutputError

_MARK = Path("compress") / "job"


class OutputDirectory:
    """The directory ``path`` that the job called ``job`` (a hash of all that determines it) is to make.

    Use it as a context manager, which holds a lock against a second run. ``files`` is the directory that becomes
    the output, ``state`` holds what a resumed run needs; both outlive an interruption, ``state`` ends with commit.

    Raises OutputError when the target exists and is not this job's own result, another run is making it, or it
    cannot be created.
    """

    def __init__(self, path: Path, job: str) -> None:
        self.path = path.absolute()
        self.job = job
        self._work = self.path.parent / f".{self.path.name}.{job[:16]}.partial"
        self.files = self._work / "files"
        self.state = self._work / "state"
        self._lock: _Lock | None = None

    @property
    def finished(self) -> bool:
        """Whether the target is the finished output of this very job."""
        mark = self.path / _MARK
        return mark.is_file() and mark.read_text(errors="replace").strip() == self.job

    @property
    def resumed(self) -> bool:
        """Whether an interrupted run of this job has left work behind."""
        return self.state.is_dir() and any(self.state.iterdir())

    def __enter__(self) -> OutputDirectory:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            self.check_target()
            self._check_work()
            self.files.mkdir(parents=True, exist_ok=True)
            self.state.mkdir(exist_ok=True)
        except OutputError:
            self._release()
            raise
        except OSError as reason:
            self._release()
            raise OutputError(
                f"cannot write to {self.path.parent}: {reason.strerror}",
                where=str(self.path),
                remedy="choose a directory that you may write to",
            ) from reason
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def commit(self) -> Path:
        """Give the finished files their final name, durably. Returns it."""
        mark = self.files / _MARK
        try:
            mark.parent.mkdir(exist_ok=True)
            mark.write_text(self.job + "\n")
            _sync_tree(self.files)
            self.files.rename(self.path)
            _sync(self.path.parent)
        except OSError as reason:
            raise OutputError(
                f"cannot finish the output: {reason.strerror}",
                where=str(self.path),
                remedy="run again: everything that is finished is reused",
            ) from reason
        self._remove_work()
        return self.path

    def clean(self) -> None:
        """Remove what earlier runs have left beside a finished output; nothing where that is not allowed."""
        with suppress(OSError, OutputError):
            self._acquire()
            self._remove_work()
        self._release()

    def _check_work(self) -> None:
        """What an earlier run has left must lie where it is written: a link would lead out of it."""
        for path in (self._work, *self._work.rglob("*")):
            if path.is_symlink():
                raise OutputError(
                    f"{path.name} in the work directory is a link",
                    where=str(path),
                    remedy="remove the work directory and run again",
                )

    def check_target(self) -> None:
        """Raises OutputError when the target exists."""
        if not os.path.lexists(self.path):
            return
        if self.finished:
            self._remove_work()
            raise OutputError(
                "the output is already there, made by this very job",
                where=str(self.path),
                remedy="nothing is left to do; delete it to make it again",
            )
        raise OutputError(
            "the output exists already",
            where=str(self.path),
            remedy="choose another name, or move it away: nothing is ever overwritten",
        )

    def _remove_work(self) -> None:
        """Remove the work directories of all jobs that were to make this output: it is made now."""
        ours = re.compile(rf"\.{re.escape(self.path.name)}\.[0-9a-f]{{16}}\.partial")
        for leftover in self.path.parent.iterdir():
            if leftover == self._work or ours.fullmatch(leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)

    def _acquire(self) -> None:
        lock = _Lock(self.path.parent / f".{self.path.name}.lock")
        try:
            fcntl.flock(lock.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.path.samestat(os.fstat(lock.descriptor), lock.path.lstat())
        except (BlockingIOError, FileNotFoundError):
            current = False  # locked by another run, or removed by one that ended this instant
        if not current:
            lock.close()
            raise OutputError(
                "another run is writing this output", where=str(self.path), remedy="wait for it, or choose another name"
            )
        self._lock = lock

    def _release(self) -> None:
        if self._lock is None:
            return
        self._lock.path.unlink(missing_ok=True)
        self._lock.close()
        self._lock = None


class _Lock:
    """An open file that marks a run. A link in its place is not followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)

    def close(self) -> None:
        os.close(self.descriptor)


def _sync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
