"""Recipes as jobs: one, or several that know nothing of each other and can be done side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from compiler.console import Console
from compiler.errors import ExecutorError, UsageError, as_ours
from compiler.executor import Executor, Local, Name, open_executor, outcomes
from compiler.job import Result, compress
from compiler.recipe import Recipe

Place = tuple[Path, Path]
"""A recipe and its output."""


@dataclass(frozen=True)
class Job:
    """What the command line says of every recipe."""

    model: str | None = None
    executor: Name | None = None
    workers: int | None = None
    trust_remote_code: bool = False
    dump_graphs: Path | None = None

    def run(self, recipe: Recipe, out: Path, console: Console) -> Result:
        """Do what ``recipe`` says. Raises what ``compress`` raises."""
        trusted, graphs = self.trust_remote_code, self.dump_graphs
        return compress(recipe, out, console=console, trust_remote_code=trusted, dump_graphs=graphs)


def load(path: Path, job: Job) -> Recipe:
    """The recipe at ``path``, overruled by the command line. Raises what ``Recipe.load`` raises."""
    recipe = Recipe.load(path, model=job.model)
    executor, workers = job.executor or recipe.run.executor, job.workers or recipe.run.workers
    return replace(recipe, run=replace(recipe.run, executor=executor, workers=workers))


def outputs(recipes: Sequence[Path], folder: Path) -> list[Place]:
    """Each recipe with its output in ``folder``, which is named after it. Raises UsageError where two share a name."""
    names: Mapping[str, Path] = {recipe.stem: recipe for recipe in recipes}
    if len(names) < len(recipes):
        raise UsageError("two recipes have one name, and would have one output", remedy="rename one of them")
    return [(recipe, folder / name) for name, recipe in names.items()]


def compress_all(job: Job, places: Sequence[Place], console: Console) -> None:
    """Do all recipes, by other processes side by side; one that fails, in whatever way, does not stop the others.

    Every recipe is checked before the first one is begun. Raises ExecutorError in the end where some failed.
    """
    for recipe, _ in places:
        load(recipe, job)
    if job.executor is None or job.executor == "local":
        failed = _failed(Local(1), _Worker(job, torch.get_num_threads(), console.quiet), places, console)
    else:
        alone = _Worker(replace(job, executor="local", workers=None), torch.get_num_threads(), quiet=True)
        with open_executor(job.executor, job.workers) as executor:
            failed = _failed(executor, alone, places, console)
    if failed:
        raise ExecutorError(
            f"{len(failed)} of {len(places)} recipes failed: {', '.join(failed)}",
            remedy="their errors are above; run the same command again when they are mended: the others are done",
        )


def _failed(executor: Executor, worker: _Worker, places: Sequence[Place], console: Console) -> list[str]:
    """Have all recipes done and say what came of each. Returns the names of those that failed."""
    failed: list[str] = []
    with closing(outcomes(executor, worker, places)) as done:
        for (recipe, out), found in zip(places, done, strict=True):
            if found.error is None:
                console.result(f"{recipe} -> {out}\n{found.value}\n")
                continue
            failed.append(recipe.name)
            console.error(f"{recipe}:\n{as_ours(found.error, '`--debug` with this recipe alone shows where')}")
    return failed


@dataclass(frozen=True)
class _Worker:
    """Does one recipe wherever it is called; killed and called again it goes on where it was."""

    job: Job
    threads: int
    quiet: bool

    def __call__(self, place: Place) -> str:
        if torch.get_num_threads() != self.threads:  # on which the last bits of sums depend
            torch.set_num_threads(self.threads)
        recipe, out = place
        graphs = self.job.dump_graphs
        job = self.job if graphs is None else replace(self.job, dump_graphs=graphs / out.name)
        return job.run(load(recipe, job), out, Console(quiet=self.quiet)).summary()
