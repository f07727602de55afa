"""The command as a user runs it, in a process of its own, and what it came to."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

from tests.jobs import PROCESSES
from tests.torture.outcomes import SECONDS, Outcome

LIMIT = 3 * SECONDS
"""Seconds that a whole run may take before it counts as hanging."""
Preparation = Callable[..., None]


def start(recipe: Path, out: Path, log: Path, prepare: Preparation | None = None, *arguments: object):
    """`compress-model RECIPE -o OUT` in a fresh process, after ``prepare(*arguments)`` there. ``log``: its messages."""
    log.unlink(missing_ok=True)
    process = PROCESSES.Process(target=_run, args=(recipe, out, log, prepare, arguments))
    process.start()
    return process


def finish(process: multiprocessing.process.BaseProcess) -> int | None:
    """The exit code of ``process``; None when it hangs, and is killed."""
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


def run(recipe: Path, out: Path, log: Path, prepare: Preparation | None = None, *arguments: object) -> Outcome:
    """The outcome of the command, as far as its exit code and its messages say."""
    return outcome_of(finish(start(recipe, out, log, prepare, *arguments)), log)


def outcome_of(code: int | None, log: Path) -> Outcome:
    text = log.read_text(encoding="utf-8", errors="replace")
    if code is None:
        return Outcome("hang", text)
    if code == 0:
        return Outcome("right")
    if code not in (1, 2) or "Traceback" in text or "error[internal]" in text or "error[" not in text:
        return Outcome("traceback", f"exit code {code}: {text}")
    return Outcome("refused" if "help: " in text else "vague", text)


def _run(recipe: Path, out: Path, log: Path, prepare: Preparation | None, arguments: tuple[object, ...]) -> None:
    import torch

    from compiler.cli import main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(*arguments)
    raise SystemExit(main([str(recipe), "-o", str(out), "-q"]))
