"""Worker processes on this machine.

A worker is a fresh Python with a pipe to this process. It does not import the program that started it, as those of
`multiprocessing` do, so a script that calls `compress` needs no guard.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, TypeVar

from compiler.errors import ExecutorError
from compiler.executor.outcome import ATTEMPTS, Outcome, deaths, outcome

T = TypeVar("T")
R = TypeVar("R")

_START = (
    "import sys; descriptor, *sys.path[:] = sys.argv[1:];"  # first of all: until then, modules of this folder are found
    "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN);"  # whoever is interrupted ends its workers itself
    "from compiler.executor.processes import serve; serve(int(descriptor))"
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
    """A process that computes a pickled function. It is started when it is first called, and again when it dies.

    One thread calls it at a time. Any may ``stop`` it, for good.
    """

    def __init__(self, function: bytes) -> None:
        self._function = function
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._stopped = False
        self._starting = Lock()

    def call(self, item: Any) -> Any:
        how = ""
        for _ in range(ATTEMPTS):
            try:
                return self._ask(item).get()
            except _Died as reason:
                how = str(reason)
        raise deaths(how)

    def stop(self) -> None:
        """End the process, amid its work too, and start none any more."""
        with self._starting:
            self._stopped = True
            process = self._process
            if process is not None:
                process.kill()
                process.wait()

    def _ask(self, item: Any) -> Outcome:
        request = pickle.dumps(item)
        try:
            pipe = self._pipe or self._start()
            pipe.send_bytes(request)
            return pipe.recv()
        except (EOFError, ConnectionError) as reason:
            raise _Died(_explained(self._end())) from reason

    def _start(self) -> Connection:
        with self._starting:
            if self._stopped:
                raise ExecutorError("the work was stopped", remedy="run it again: what is finished is reused")
            self._process, self._pipe = _process()
        self._pipe.send_bytes(self._function)
        return self._pipe

    def _end(self) -> int:
        """Be rid of a process that answers no more. Returns its exit status, 0 when there is none."""
        process, pipe = self._process, self._pipe
        self._process = self._pipe = None
        if process is None or pipe is None:
            return 0
        pipe.close()
        process.kill()
        return process.wait()


def _process() -> tuple[subprocess.Popen[bytes], Connection]:
    """A fresh process that serves the pipe. Raises ExecutorError when the system gives none."""
    try:
        ours, theirs = Pipe()
        with theirs:
            command = [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path]
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2)
        return process, ours
    except OSError as reason:
        cause = f"no worker can be started: {reason.strerror}"
        raise ExecutorError(cause, remedy="use fewer `workers`, or `executor: local`") from reason


class _Died(Exception):
    """A worker is no more."""


def _explained(status: int) -> str:
    return f"by signal {-status}" if status < 0 else f"with exit status {status}"


def serve(descriptor: int) -> None:
    """What a worker does: take the function, then items, until whoever sends them is gone, and the process with it."""
    pipe, told = Connection(descriptor), SimpleQueue[bytes]()
    Thread(target=_receive, args=(pipe, told), daemon=True).start()
    function = pickle.loads(told.get())
    try:
        while True:
            pipe.send(outcome(function, pickle.loads(told.get())))
    except ConnectionError:
        return


def _receive(pipe: Connection, told: SimpleQueue[bytes]) -> None:
    """Hand on what is sent. At its end nobody waits for the work any more, which stops where it is."""
    try:
        while True:
            told.put(pipe.recv_bytes())
    except (EOFError, ConnectionError):
        os._exit(1)
