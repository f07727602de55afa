"""Executors whose workers are killed, and functions for them. A module of its own: workers import it."""

import os
import signal
import threading
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


def refused(number: int) -> int:
    raise DataError(f"{number} is refused", remedy="take another", where="a file")


def odd(number: int) -> int:
    raise Unspeakable(number, "twice")


class Unspeakable(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, number, reason):
        super().__init__(f"{number} {reason}")
