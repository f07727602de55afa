"""The same job by threads, by worker processes and by Ray: the same bytes, time and memory, with and without a kill.

Makes a Llama-shaped bf16 checkpoint with random weights, rounds it to int4 in groups of 128 with
each executor in turn, a few rounds over, and compares the files. `killed` loses a worker process every few seconds.
Prints the time of the writing step over that of the local run, medians of the rounds, and the memory
of the largest worker.

``--layers 4``, ``--rounds 3``, ``--kill-every 5`` seconds. Needs 5 GB of disk, gives it back.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import COMMAND, WORK, show
from benchmarks.streaming import make_checkpoint

PASSES = [{"quantize": {"where": "linear", "skip": ["lm_head"], "bits": 4, "group": 128}}]
WAYS = {
    "local, 2 threads": ("local", 2),
    "processes, 1": ("processes", 1),
    "processes, 2": ("processes", 2),
    "processes, 2, killed": ("processes", 2),
    "ray, 2": ("ray", 2),
}


@dataclass
class Taken:
    """What the runs of one way took: seconds of the writing step, and bytes of the largest worker."""

    seconds: list[float] = field(default_factory=list)
    worker: int = 0
    kills: int = 0
    digests: set[str] = field(default_factory=set)


class Watch:
    """Looks after the workers below a process: their memory, and every so many seconds the end of one."""

    def __init__(self, parent: int, taken: Taken, kill_every: float | None) -> None:
        self._parent, self._taken, self._kill_every = parent, taken, kill_every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        waited = 0.0
        while not self._stop.wait(0.5):
            workers = list(_workers(self._parent))
            self._taken.worker = max([self._taken.worker, *(size for _, size in workers)])
            waited += 0.5
            if self._kill_every and waited >= self._kill_every and workers:
                os.kill(workers[0][0], signal.SIGKILL)
                self._taken.kills, waited = self._taken.kills + 1, 0.0


def _workers(parent: int) -> list[tuple[int, int]]:
    """Worker processes and the bytes that they hold now."""
    listed = subprocess.run(["ps", "-eo", "pid,ppid,rss,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 3) for line in listed.splitlines()[1:]]
    return [
        (int(pid), int(size) * 1024)
        for pid, above, size, command in rows
        if (int(above) == parent and "import serve" in command) or "ray::_outcome_in" in command
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kill-every", type=float, default=5.0)
    options = parser.parse_args()
    work = WORK / "executors"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        compare(work, options)
    finally:
        shutil.rmtree(work)


def compare(work: Path, options: argparse.Namespace) -> None:
    model = make_checkpoint(work / "model", options.layers)
    recipe = work / "int4.yaml"
    recipe.write_text(json.dumps({"model": str(model), "passes": PASSES}))
    found: dict[str, Taken] = defaultdict(Taken)
    for _ in range(options.rounds):
        for name, (executor, workers) in WAYS.items():
            kill_every = options.kill_every if name.endswith("killed") else None
            run_one(recipe, work / "out", executor, workers, found[name], kill_every)
            print(f"{name}: {found[name].seconds[-1] / found['local, 2 threads'].seconds[-1]:.2f}", flush=True)
    usual = statistics.median(found["local, 2 threads"].seconds)
    rows = [
        [
            name,
            f"{statistics.median(taken.seconds) / usual:.2f}",
            f"{min(taken.seconds) / usual:.2f} to {max(taken.seconds) / usual:.2f}",
            f"{taken.worker / 1e6:.0f} MB" if taken.worker else "",
            str(taken.kills),
        ]
        for name, taken in found.items()
    ]
    show("Writing", [["executor", "time / local", "range", "largest worker", "workers killed"], *rows])
    same = len(set.union(*(taken.digests for taken in found.values()))) == 1
    print("all outputs are the same, to the byte" if same else "OUTPUTS DIFFER")
    sys.exit(not same)


def run_one(recipe: Path, out: Path, executor: str, workers: int, taken: Taken, kill_every: float | None) -> None:
    command = [*COMMAND, str(recipe), "-o", str(out), "-q", "--executor", executor, "--workers", str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    with Watch(process.pid, taken, kill_every):
        if process.wait():
            sys.exit(f"{' '.join(command)} failed")
    taken.seconds.append(json.loads((out / "compress" / "timings.json").read_text())["seconds"]["write"])
    digest = hashlib.sha256()
    for file in sorted(out.glob("*.safetensors")):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    taken.digests.add(digest.hexdigest())
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
