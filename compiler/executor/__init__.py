"""Where work is done: in this process, in several, or on the machines of a Ray cluster.

What is spread is one function of many items. It may be called twice for the same item: a worker that dies is replaced,
and its item done again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

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

        Where workers are other processes, ``function``, items and results are pickled. The function raised with
        raises what it raised; ExecutorError when workers die of an item again and again.
        """
        ...


@dataclass(frozen=True)
class Local:
    """Threads of this process."""

    workers: int = THREADS

    @contextmanager
    def open(self, function: Callable[[T], R]) -> Generator[Callable[[T], R]]:
        yield function


def in_order(executor: Executor, function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """``function`` of all items; yields each result as it and all before it are there."""
    with executor.open(function) as call:
        if executor.workers == 1:
            yield from map(call, items)
            return
        with ThreadPoolExecutor(executor.workers) as pool:
            yield from pool.map(call, items)


@contextmanager
def open_executor(name: Name, workers: int | None = None) -> Generator[Executor]:
    """The executor called ``name``; without ``workers`` two threads, a process a core, or all cores of the cluster.

    Raises ExecutorError when Ray is not installed or cannot be reached.
    """
    match name:
        case "local":
            yield Local(workers or THREADS)
        case "processes":
            from compiler.executor.processes import Processes

            yield Processes(workers or len(os.sched_getaffinity(0)))
        case "ray":
            from compiler.executor.cluster import open_cluster

            with open_cluster(workers) as cluster:
                yield cluster
