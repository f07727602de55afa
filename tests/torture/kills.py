"""Runs killed at random instants and run again: the output must be that of an undisturbed run, to the byte.

A signal is sent once the run has begun, after a time drawn from 0 to the time of an undisturbed run. Until the
output appears nothing may stand under its name, and afterwards nothing beside it.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tests.torture.command import finish, outcome_of, run, start
from tests.torture.outcomes import Outcome, Tally
from tests.torture.subjects import contents, difference

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KEY = "compress/job"
"""The key of a job, by which a run finds its own work: it changes with the times of the inputs."""
MEANT = {signal.SIGKILL: -9, signal.SIGTERM: -15, signal.SIGINT: 130}
"""How a run ends by each signal."""


def undisturbed(recipe: Path, out: Path) -> tuple[dict[str, bytes], float]:
    """The contents of an output and the seconds that it took. Raises RuntimeError when it fails."""
    run(recipe, out.with_name(f"{out.name}-warm"), _log(out))
    begun = time.monotonic()
    outcome = run(recipe, out, _log(out))
    if outcome.kind != "right":
        raise RuntimeError(f"an undisturbed run of {recipe.name} fails: {outcome.detail}")
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
        tally.show(f"killed: {name}")


def killed(recipe: Path, out: Path, expected: dict[str, bytes], duration: float, instants: random.Random) -> Outcome:
    """One to three kills, then a run to the end."""
    for _ in range(instants.choice((1, 1, 1, 2, 3))):
        sent, wait = instants.choice(SIGNALS), instants.uniform(0, duration)
        code = _interrupted(recipe, out, sent, wait)
        if code not in (0, MEANT[sent]):
            return outcome_of(code, _log(out))
        if out.exists():
            break
    return resumed(recipe, out, expected)


def resumed(recipe: Path, out: Path, expected: dict[str, bytes]) -> Outcome:
    """A run to the end, of what earlier runs have left."""
    outcome = run(recipe, out, _log(out))
    strays = list(_strays(out)) if outcome.kind == "right" else []
    if outcome.kind != "right" or strays:
        return Outcome("stray", ", ".join(strays)) if strays else outcome
    ignored = contents(out).keys() - expected.keys() & {KEY}
    complaint = difference({name: data for name, data in contents(out).items() if name not in ignored}, expected)
    return Outcome("wrong", complaint) if complaint else outcome


def _interrupted(recipe: Path, out: Path, sent: signal.Signals, wait: float) -> int | None:
    process = start(recipe, out, _log(out))
    while process.exitcode is None and not _log(out).exists():  # the command has not begun
        process.join(0.01)
    process.join(wait)
    if process.exitcode is None and process.pid is not None:
        with suppress(ProcessLookupError):  # it has just come to its end
            os.kill(process.pid, sent)
    return finish(process)


def _log(out: Path) -> Path:
    return out.with_name(f"log-{out.name}")


def _strays(out: Path) -> Iterable[str]:
    """What a finished run has left beside its output."""
    return (path.name for path in out.parent.glob(f".{out.name}.*"))
