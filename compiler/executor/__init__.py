"""Where work is done: in this process, in several, or on the machines of a Ray cluster.

What is spread is one function of many items. It may be called twice for the same item: a worker that dies is replaced,
and its item done again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from compiler.executor.outcome import Outcome
from compiler.executor.pool import threads

T = TypeVar("T")
R = TypeVar("R")
Name = Literal["local", "processes", "ray"]

NAMES: tuple[Name, ...] = ("local", "processes", "ray")
THREADS = 2


class Executor(Protocol):
    """Who computes. ``workers`` items are worked on at once."""

    @property
    def workers(self) -> int: ...

    def open(self, function: Callable[[T], R]) -> AbstractContextManager[Callable[[T], R]]:
        """``function``, computed by a worker; ``workers`` threads may call it at once.

        Where workers are other processes, ``function``, items and results are pickled. A call raises what ``function``
        raised, ExecutorError when workers die of an item again and again, or cannot be had. Leaving the context ends
        other processes amid their work, and calls that wait for them raise ExecutorError.
        """
        ...


@dataclass(frozen=True)
class Local:
    """Threads of this process."""

    workers: int = THREADS

    @contextmanager
    def open(self, function: Callable[[T], R]) -> Generator[Callable[[T], R]]:
        yield function


def in_order(executor: Executor, function: Callable[[T], R], items: Sequence[T]) -> Generator[R]:
    """``function`` of all items; yields each result as it and all before it are there. Raises what the first raises.

    When it is closed, and when it raises, work on items that are left has ended.
    """
    with closing(outcomes(executor, function, items)) as found:
        for each in found:
            yield each.get()


def outcomes(executor: Executor, function: Callable[[T], R], items: Sequence[T]) -> Generator[Outcome]:
    """What ``function`` of each item comes to, in order: an item that fails does not stop the others."""
    if executor.workers == 1:
        with executor.open(function) as call:
            yield from map(_attempted(call), items)
        return
    # Other processes end before the threads that wait for them are joined: an interrupted run leaves items unfinished.
    with threads(executor.workers) as pool, executor.open(function) as call:
        yield from pool.map(_attempted(call), items)


def _attempted(call: Callable[[T], Any]) -> Callable[[T], Outcome]:
    def attempt(item: T) -> Outcome:
        try:
            return Outcome(call(item))
        except Exception as error:
            return Outcome(error=error)

    return attempt


def default_workers(name: Name) -> int:
    """How many workers there are when nobody says; of a Ray cluster that is joined, its cores count instead."""
    return THREADS if name == "local" else len(os.sched_getaffinity(0))


@contextmanager
def open_executor(name: Name, workers: int | None = None) -> Generator[Executor]:
    """The executor called ``name``; without ``workers`` ``default_workers``, or all cores of the cluster.

    Raises ExecutorError when Ray is not installed or cannot be reached.
    """
    match name:
        case "local":
            yield Local(workers or default_workers(name))
        case "processes":
            from compiler.executor.processes import Processes

            yield Processes(workers or default_workers(name))
        case "ray":
            from compiler.executor.cluster import open_cluster

            with open_cluster(workers) as cluster:
                yield cluster
