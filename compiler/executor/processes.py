"""Worker processes on this machine.

A worker is a fresh Python with a pipe to this process. It does not import the program that started it, as those of
`multiprocessing` do, so a script that calls `compress` needs no guard.
"""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar

from compiler.executor.outcome import ATTEMPTS, Outcome, deaths, outcome

T = TypeVar("T")
R = TypeVar("R")

_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]);"
    "from compiler.executor.processes import serve; serve(int(sys.argv[1]))"
)


@dataclass(frozen=True)
class Processes:
    """So many processes of this machine, which live while a function is open."""

    workers: int

    @contextmanager
    def open(self, function: Callable[[T], R]) -> Generator[Callable[[T], R]]:
        told = pickle.dumps(function)
        crew = [_Worker(told) for _ in range(self.workers)]
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for worker in crew:
            idle.put(worker)

        def call(item: T) -> R:
            worker = idle.get()
            try:
                return worker.call(item)
            finally:
                idle.put(worker)

        try:
            yield call
        finally:
            for worker in crew:
                worker.stop()


class _Worker:
    """A process that computes a pickled function. It is started when it is first called, and again when it dies."""

    def __init__(self, function: bytes) -> None:
        self._function = function
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def call(self, item: Any) -> Any:
        how = ""
        for _ in range(ATTEMPTS):
            try:
                return self._ask(item).get()
            except _Died as reason:
                how = str(reason)
        raise deaths(how)

    def stop(self) -> int:
        """End the process. Returns its exit status, 0 when there is none."""
        if self._process is None or self._pipe is None:
            return 0
        self._pipe.close()
        self._process.kill()
        status = self._process.wait()
        self._process = self._pipe = None
        return status

    def _ask(self, item: Any) -> Outcome:
        request = pickle.dumps(item)
        try:
            pipe = self._pipe or self._start()
            pipe.send_bytes(request)
            return pipe.recv()
        except (EOFError, ConnectionError) as reason:
            raise _Died(_explained(self.stop())) from reason

    def _start(self) -> Connection:
        self._pipe, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-c", _START, str(theirs.fileno()), json.dumps(sys.path)]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2)
        self._pipe.send_bytes(self._function)
        return self._pipe


class _Died(Exception):
    """A worker is no more."""


def _explained(status: int) -> str:
    return f"by signal {-status}" if status < 0 else f"with exit status {status}"


def serve(descriptor: int) -> None:
    """What a worker does: take the function, then items, until whoever sends them is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that was interrupted ends its workers itself
    with Connection(descriptor) as pipe:
        try:
            function = pipe.recv()
            while True:
                pipe.send(outcome(function, pipe.recv()))
        except (EOFError, ConnectionError):
            return
