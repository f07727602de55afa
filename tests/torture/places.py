"""Places and times that are against a run: full disks, little memory, nowhere to write, two at once, links.

The first attempt ends well or in one of our own errors; then the obstacle goes, and the output is the usual one.
"""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from compiler.recipe import Recipe
from tests.torture.command import finish, outcome_of, run, start
from tests.torture.kills import KEY, resumed, undisturbed
from tests.torture.mutate import damage_bytes
from tests.torture.outcomes import Outcome, Tally
from tests.torture.subjects import contents

CASES = {"file sizes": 30, "memory": 30, "read-only": 6, "two at once": 12, "clocks": 12, "links": 12, "work": 40}
TRIED = ("quantize", "generated", "onnx", "gguf", "experts")
NEW_USER, NEW_MOUNTS = 0x10000000, 0x00020000  # flags of unshare(2)


class Case:
    """One obstacle: a recipe, the output it makes undisturbed, a fresh place for it, and all chance."""

    def __init__(self, recipe: Path, out: Path, expected: dict[str, bytes], chance: random.Random) -> None:
        self.recipe, self.out, self.expected, self.chance = recipe, out, expected, chance
        self.log = out.with_name(f"log-{out.name}")

    def attempt(self, prepare: Callable[..., None] | None = None, *arguments: object) -> Outcome:
        return run(self.recipe, self.out, self.log, prepare, *arguments)

    def resumed(self) -> Outcome:
        return resumed(self.recipe, self.out, self.expected)

    def after(self, first: Outcome) -> Outcome:
        """What the first attempt came to, if the run that follows it makes the usual output."""
        if first.kind not in ("right", "refused"):
            return first
        second = self.resumed()
        return first if second.kind == "right" else second


def obstruct(recipes: dict[str, Path], counts: Mapping[str, int], seed: int, tally: Tally, work: Path) -> None:
    """Obstacles, each as often as ``counts`` says."""
    tried = [name for name in TRIED if name in recipes]
    whole = {name: undisturbed(recipes[name], work / f"whole-{name}")[0] for name in tried}
    for campaign, count in counts.items():
        for number in range(count):
            chance = random.Random(f"{seed} {campaign} {number}")
            name = tried[number % len(tried)]
            case = Case(recipes[name], work / f"{campaign.replace(' ', '-')}-{number}", whole[name], chance)
            tally.add(campaign, f"case {number} of seed {seed}", OBSTACLES[campaign](case))
        if count:
            tally.show(campaign)


def full_disk(case: Case) -> Outcome:
    """No file may grow beyond some byte, as on a disk that is full then."""
    largest = max(map(len, case.expected.values()))
    return case.after(case.attempt(_limit, resource.RLIMIT_FSIZE, case.chance.randrange(1, largest)))


def little_memory(case: Case) -> Outcome:
    """Up to 16 megabytes more than the program takes by itself."""
    return case.after(case.attempt(_limit_memory, case.chance.randrange(1, 1000) << 14))


def nowhere_to_write(case: Case) -> Outcome:
    """The place is mounted read-only, where that can be arranged; elsewhere it is a place that takes no files."""
    if not _may_mount():
        return run(case.recipe, Path("/proc/self/fdinfo/out"), case.log)
    return case.after(case.attempt(_mount_read_only, case.out.parent))


def two_at_once(case: Case) -> Outcome:
    """One makes the output, the other is told so."""
    first = start(case.recipe, case.out, case.log)
    time.sleep(case.chance.uniform(0, 1.5))
    other = case.log.with_suffix(".other")
    second = start(case.recipe, case.out, other)
    outcomes = [outcome_of(finish(first), case.log), outcome_of(finish(second), other)]
    bad = [outcome for outcome in outcomes if outcome.kind not in ("right", "refused")]
    if bad or all(outcome.kind == "refused" for outcome in outcomes):
        return bad[0] if bad else Outcome("wrong", "neither run made the output")
    return case.resumed()


def wrong_clocks(case: Case) -> Outcome:
    """An interrupted run, then another time of day, and inputs that were written in another century.

    The key of a job changes with the time of its inputs: it is no part of what is compared.
    """
    case.expected = {name: data for name, data in case.expected.items() if name != KEY}
    process = start(case.recipe, case.out, case.log)
    process.join(case.chance.uniform(0, 2))
    process.kill()
    process.join()
    moment = case.chance.choice((0, 1, 86_400, 2**31 - 1, 2**32, 4_102_444_800))
    weights = Path(Recipe.load(case.recipe).model) / "model.safetensors"
    before = weights.stat()
    os.utime(weights, (moment, moment))
    try:
        return case.after(case.attempt(_set_clock, float(case.chance.choice((0, moment, -86_400)))))
    finally:
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def links(case: Case) -> Outcome:
    """Links, to a folder that is not the program's, where it is about to write."""
    elsewhere = case.out.with_name(f"elsewhere-{case.out.name}")
    elsewhere.mkdir()
    for name in ("model.safetensors", "journal", "config.json"):
        (elsewhere / name).write_text("mine")
    _interrupt(case)
    for work in [*case.out.parent.glob(f".{case.out.name}.*.partial")]:
        _replace_by_link(case.chance.choice(sorted(work.rglob("*")) or [work]), elsewhere)
    if case.chance.random() < 0.3:
        case.out.with_name(f".{case.out.name}.lock").unlink(missing_ok=True)
        case.out.with_name(f".{case.out.name}.lock").symlink_to(elsewhere / "journal")
    first = case.attempt()
    if contents(elsewhere) != dict.fromkeys(("config.json", "journal", "model.safetensors"), b"mine"):
        return Outcome("stray", "a link was followed")
    for path in _links(case.out):
        path.unlink()
    return case.after(first)


def damaged_work(case: Case) -> Outcome:
    """What an interrupted run has left is damaged, but for weights that it has finished."""
    _interrupt(case)
    for work in case.out.parent.glob(f".{case.out.name}.*.partial"):
        files = [path for path in work.rglob("*") if path.is_file() and "files" not in path.parts]
        for path in case.chance.sample(files, min(2, len(files))):
            path.write_bytes(damage_bytes(path.read_bytes(), case.chance))
    return case.resumed()


OBSTACLES: dict[str, Callable[[Case], Outcome]] = {
    "file sizes": full_disk,
    "memory": little_memory,
    "read-only": nowhere_to_write,
    "two at once": two_at_once,
    "clocks": wrong_clocks,
    "links": links,
    "work": damaged_work,
}


def _interrupt(case: Case) -> None:
    """A run that is killed once it has left something behind."""
    process = start(case.recipe, case.out, case.log)
    ends = time.monotonic() + case.chance.uniform(0.4, 2)
    while process.exitcode is None and time.monotonic() < ends:
        process.join(0.02)
    process.kill()
    process.join()
    if case.out.exists():
        shutil.rmtree(case.out)


def _replace_by_link(path: Path, elsewhere: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
        path.symlink_to(elsewhere)
    else:
        path.unlink()
        path.symlink_to(elsewhere / (path.name if (elsewhere / path.name).exists() else "journal"))


def _links(out: Path) -> Iterator[Path]:
    for place in [*out.parent.glob(f".{out.name}.*")]:
        yield from (path for path in (place, *place.rglob("*")) if path.is_symlink())


# --- what is done in the process of a run, before it starts ------------------------------------------------------


def _limit(which: int, amount: int) -> None:
    resource.setrlimit(which, (amount, amount))


def _limit_memory(more: int) -> None:
    """``more`` bytes than the process has mapped now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + more)


def _set_clock(seconds: float) -> None:
    """Let Python's clock stand at ``seconds`` since 1970."""
    time.time = lambda: seconds


def _mount_read_only(folder: Path) -> None:
    _own_namespace()
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def _own_namespace() -> None:
    """Mounts of this process are seen by no other from now on."""
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_USER | NEW_MOUNTS):
        raise OSError(ctypes.get_errno(), "unshare")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _may_mount() -> bool:
    return subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
