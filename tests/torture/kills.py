"""Runs killed at random instants and run again: the output must be that of an undisturbed run, to the byte.

A signal is sent once the run has begun, after a time drawn from 0 to the time of an undisturbed run. Until the
output appears nothing may stand under its name, and afterwards nothing beside it.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from compiler.errors import CompressError
from tests.torture.outcomes import SECONDS, Outcome, Tally
from tests.torture.subjects import contents, difference

PROCESSES = multiprocessing.get_context("forkserver")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MEANT = {signal.SIGKILL: (-9,), signal.SIGTERM: (-15,), signal.SIGINT: (130,)}
REFUSED, TRACEBACK, INTERRUPTED = 2, 3, 130


def run_recipe(recipe: Path, out: Path) -> None:
    """The whole job in a process of its own; how it ends is its exit code."""
    import torch

    from compiler import Recipe, compress

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        compress(Recipe.load(recipe), out)
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except CompressError as error:
        print(error, flush=True)
        raise SystemExit(REFUSED if error.remedy else TRACEBACK) from None


def finish(process: multiprocessing.process.BaseProcess) -> int | None:
    """The exit code of ``process``; None when it hangs, and is killed."""
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def start(recipe: Path, out: Path) -> multiprocessing.process.BaseProcess:
    process = PROCESSES.Process(target=run_recipe, args=(recipe, out))
    process.start()
    return process


def undisturbed(recipe: Path, out: Path) -> tuple[dict[str, bytes], float]:
    """The contents of an output and the seconds that it took. Raises RuntimeError when it fails."""
    finish(start(recipe, out.with_name(f"{out.name}-warm")))
    begun = time.monotonic()
    code = finish(start(recipe, out))
    if code != 0:
        raise RuntimeError(f"an undisturbed run of {recipe.name} ended with {code}")
    return contents(out), time.monotonic() - begun


def kill_runs(recipes: dict[str, Path], kills: int, seed: int, tally: Tally, work: Path) -> None:
    """``kills`` in all, shared out evenly among ``recipes``."""
    for index, (name, recipe) in enumerate(recipes.items()):
        own = kills // len(recipes) + (index < kills % len(recipes))
        expected, duration = undisturbed(recipe, work / f"whole-{name}")
        for case in range(own):
            instants = random.Random(f"{seed} {name} {case}")
            outcome = killed(recipe, work / f"out-{name}-{case}", expected, duration, instants)
            tally.add(f"killed: {name}", f"kill {case} of seed {seed}", outcome)


def killed(recipe: Path, out: Path, expected: dict[str, bytes], duration: float, instants: random.Random) -> Outcome:
    """One to three kills, then a run to the end."""
    for _ in range(instants.choice((1, 1, 1, 2, 3))):
        sent, wait = instants.choice(SIGNALS), instants.uniform(0, duration)
        code = _interrupted(recipe, out, sent, wait)
        if code not in (0, *MEANT[sent]):
            return Outcome("hang" if code is None else "traceback", f"{sent.name} after {wait:.3f} s: exit code {code}")
        if out.exists():
            break
    code = finish(start(recipe, out))
    if code != 0:
        return Outcome("hang" if code is None else "traceback", f"resumed: exit code {code}")
    strays = list(_strays(out))
    if strays:
        return Outcome("stray", ", ".join(strays))
    complaint = difference(contents(out), expected)
    return Outcome("wrong", complaint) if complaint else Outcome("right")


def _interrupted(recipe: Path, out: Path, sent: signal.Signals, wait: float) -> int | None:
    process = start(recipe, out)
    process.join(wait)
    if process.exitcode is None and process.pid is not None:
        import os

        os.kill(process.pid, sent)
    return finish(process)


def _strays(out: Path) -> Iterable[str]:
    """What a finished run has left beside its output."""
    names: Iterator[Path] = out.parent.glob(f".{out.name}*")
    return (path.name for path in names)
