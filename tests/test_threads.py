"""Pools of threads: they compute, and end at once where there is no memory for a thread."""

from __future__ import annotations

import errno
import mmap

import pytest

from compiler.errors import out_of_memory
from compiler.executor import pool as module
from compiler.executor.pool import threads


@pytest.mark.parametrize("count", [1, 3])
def test_all_items_are_done_in_order(count):
    with threads(count) as workers:
        assert list(workers.map(abs, range(-20, 0))) == list(range(20, 0, -1))


@pytest.mark.parametrize("room", [0, 1, 2])
def test_no_memory_for_a_thread_is_an_error(room, monkeypatch):
    """Also where some threads have begun."""
    found = []

    def take(descriptor, size):
        if len(found) == room:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        found.append(size)
        return mmap.mmap(descriptor, 1)

    monkeypatch.setattr(module, "mmap", type("Mapping", (), {"mmap": staticmethod(take)}))
    with pytest.raises(MemoryError) as error, threads(3):
        pytest.fail("a pool without its threads")
    assert out_of_memory(error.value) and len(found) == room
    assert all(size >= module.MARGIN for size in found)
