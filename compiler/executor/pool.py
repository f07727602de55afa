"""Pools of threads that fail where there is no memory for a thread, where Python's own would wait without end.

`threading.Thread.start` waits until the new thread says that it has begun, and one that finds no memory for its first
object never does (seen with CPython 3.11 under a limit on address space).
"""

from __future__ import annotations

import mmap
import resource
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier

USUAL_STACK = 8 << 20
MARGIN = 4 << 20  # bytes for the first objects of a thread: Python and the C library take memory by the megabyte


@contextmanager
def threads(count: int) -> Generator[ThreadPoolExecutor]:
    """A pool of ``count`` threads, all of which have begun. Raises MemoryError where there is no memory for one."""
    begun = Barrier(count)
    with ThreadPoolExecutor(count) as pool:
        try:
            for _ in range(count):
                _make_sure_of(_stack() + MARGIN)
                pool.submit(begun.wait)
        except BaseException:
            begun.abort()
            raise
        yield pool


def _make_sure_of(size: int) -> None:
    """Raises MemoryError where the process may not take ``size`` bytes more. None of them is touched."""
    try:
        mmap.mmap(-1, size).close()
    except OSError as reason:
        raise MemoryError from reason


def _stack() -> int:
    """The bytes of a thread's stack."""
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return USUAL_STACK if soft == resource.RLIM_INFINITY else soft
