"""What an attack on the program came to, and the counts of a campaign."""

from __future__ import annotations

import signal
import traceback
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from compiler.errors import CompressError

Kind = Literal["right", "refused", "traceback", "hang", "wrong", "vague", "stray"]
GOOD: tuple[Kind, ...] = ("right", "refused")
SECONDS = 60


class Hang(BaseException):
    """Raised in what takes longer than it may; no ``except Exception`` may swallow it."""


@dataclass(frozen=True)
class Outcome:
    """``right``: the bytes of an undisturbed run, or what another reader of the format makes of it.

    ``refused``: one of our own errors, with cause and remedy. All others are defects: ``vague`` is an error of ours
    without a remedy, ``stray`` a file where none belongs, ``wrong`` a result that is not right, without a word.
    """

    kind: Kind
    detail: str = ""


@dataclass
class Tally:
    """Counts of outcomes by campaign, and the defects with what repeats them."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    defects: list[str] = field(default_factory=list)

    def add(self, campaign: str, case: str, outcome: Outcome) -> None:
        self.counts.setdefault(campaign, Counter())[outcome.kind] += 1
        if outcome.kind not in GOOD:
            self.defects.append(f"{campaign}, {case}: {outcome.kind}: {outcome.detail}")

    def show(self, campaign: str) -> None:
        """Print what ``campaign`` has come to so far."""
        print(f"{campaign}: {dict(self.counts[campaign])}", flush=True)

    def table(self) -> str:
        """The counts as a table in Markdown."""
        lines = ["| campaign | cases | right | refused | defects |", "|---|---|---|---|---|"]
        for campaign, found in self.counts.items():
            good = [found[kind] for kind in GOOD]
            lines.append(f"| {campaign} | {found.total()} | {good[0]} | {good[1]} | {found.total() - sum(good)} |")
        return "\n".join(lines)


def judged(attempt: Callable[[], str]) -> Outcome:
    """The outcome of ``attempt``, which says what is wrong with its result, or nothing."""
    try:
        with time_limit(SECONDS):
            complaint = attempt()
    except CompressError as error:
        return Outcome("refused" if error.remedy else "vague", str(error))
    except Hang:
        return Outcome("hang", f"more than {SECONDS} s")
    except Exception:
        return Outcome("traceback", traceback.format_exc())
    return Outcome("wrong", complaint) if complaint else Outcome("right")


@contextmanager
def time_limit(seconds: float) -> Generator[None]:
    """Raises Hang in the block when it takes longer."""

    def stop(number: int, frame: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
