"""What a run may use: memory, and workers."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compiler.console import human_bytes
from compiler.errors import RecipeError
from compiler.executor import THREADS, Executor, default_workers, open_executor
from compiler.instrument import rss
from compiler.recipe import Recipe
from compiler.weights.writer import BUDGET

SMALLEST_BUDGET = 64 << 20
WORKER_MEMORY = 300 << 20
"""Bytes that a worker process takes by itself: PyTorch, and for a GGUF source transformers."""


@dataclass(frozen=True)
class Means:
    """Who writes, and how many bytes they may hold together."""

    executor: Executor
    budget: int

    def options(self) -> dict[str, Any]:
        """As options of ``compiler.weights.writer.write``."""
        return {"executor": self.executor, "budget": self.budget}


@contextmanager
def open_means(recipe: Recipe) -> Generator[Means]:
    """What ``recipe`` says, while it is in use.

    Raises RecipeError when its memory is too little to work with, ExecutorError when there are no workers.
    """
    with open_executor(recipe.run.executor, recipe.run.workers) as executor:
        yield Means(executor, _budget(recipe, executor.workers))


def memory_to_use(recipe: Recipe) -> int:
    """The recipe's memory, or half of what is free now, in bytes."""
    if recipe.run.memory is not None:
        return recipe.run.memory
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


@dataclass(frozen=True)
class Expected:
    """What writing is going to use: ``workers`` with ``budget`` bytes together, beside ``taken`` by all processes."""

    workers: int
    budget: int
    taken: int


def expected_means(recipe: Recipe) -> Expected:
    """What ``recipe`` says, from the machine as it is now; a Ray cluster is taken to have the cores of this machine.

    Raises RecipeError when its memory is too little to work with.
    """
    workers = recipe.run.workers or default_workers(recipe.run.executor)
    return Expected(workers, _budget(recipe, workers), rss() + _others(recipe, workers))


def _others(recipe: Recipe, workers: int) -> int:
    """Bytes that worker processes take by themselves."""
    return 0 if recipe.run.executor == "local" else workers * WORKER_MEMORY


def _budget(recipe: Recipe, workers: int) -> int:
    """Bytes that writing may hold: what the recipe's memory leaves beside all processes, at most the usual budget."""
    usual = BUDGET * max(THREADS, workers) // THREADS
    if recipe.run.memory is None:
        return usual
    others = _others(recipe, workers)
    taken = rss() + others
    if recipe.run.memory - taken < SMALLEST_BUDGET:
        place = recipe.places["run"].items["memory"].span if "run" in recipe.places else None
        cause = f"`memory` leaves nothing to work with: the program itself takes {human_bytes(taken)}"
        enough = f"give it at least {human_bytes(taken + SMALLEST_BUDGET)}"
        raise RecipeError(cause, span=place, remedy=f"{enough}, or fewer `workers`" if others else enough)
    return min(recipe.run.memory - taken, usual)
