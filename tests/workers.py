"""Executors whose workers are killed, and functions for them. A module of its own: workers import it."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from compiler.errors import DataError


class Killing:
    """``executor``, of whose workers ``kills`` are killed."""

    def __init__(self, executor, marks: Path, kills: int = 6):
        self.executor, self.marks, self.kills = executor, marks, kills

    @property
    def workers(self):
        return self.executor.workers

    @contextmanager
    def open(self, function):
        with self.executor.open(Dying(function, self.marks, self.kills)) as call:
            yield call


class Dying:
    """``function``, of whose calls the first ``kills`` over all workers kill theirs: before, after or amid the work."""

    def __init__(self, function, marks: Path, kills: int):
        self.function, self.marks, self.kills = function, marks, kills

    def __call__(self, item):
        number = self._next()
        if number >= self.kills:
            return self.function(item)
        match number % 3:
            case 0:
                _die()
            case 1:
                threading.Timer(0.003, _die).start()
        self.function(item)
        return _die()

    def _next(self) -> int:
        """How many calls there were before this one."""
        for number in range(10**6):
            try:
                (self.marks / str(number)).touch(exist_ok=False)
                return number
            except FileExistsError:
                continue
        raise AssertionError


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def squared(number: int) -> int:
    return number * number


def squared_but_zero(number: int) -> int:
    """The square of ``number``; of 0 the worker dies."""
    if number == 0:
        _die()
    return number * number


def interrupting(item: tuple[int, Path, int]) -> None:
    """Interrupt the process of this id, once two of its items are begun, and work on for a while."""
    process, marks, number = item
    (marks / f"begun-{number}").touch()
    if number == 0:
        while not (marks / "begun-1").exists():
            time.sleep(0.01)
        os.kill(process, signal.SIGINT)
    time.sleep(5)
    (marks / f"done-{number}").touch()


def endless(begun: Path) -> None:
    """Work that is longer than any test."""
    begun.touch()
    time.sleep(300)


def refused(number: int) -> int:
    raise DataError(f"{number} is refused", remedy="take another", where="a file")


def odd(number: int) -> int:
    raise Unspeakable(number, "twice")


class Unspeakable(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, number, reason):
        super().__init__(f"{number} {reason}")
