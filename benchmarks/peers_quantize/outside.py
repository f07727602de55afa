"""What the scripts share that run a package in an environment of its own; it imports nothing of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass

FLOAT = 32  # bits of a scale in a checkpoint of float32


@dataclass(frozen=True)
class Job:
    """Quantise the linear maps of the layers of ``model``, a checkpoint, and write one that transformers loads.

    ``windows`` is a file with the tokens to calibrate on, int64 [count, length]; ``method`` one of the package's.
    """

    model: str
    windows: str
    out: str
    method: str
    bits: int
    group: int
    symmetric: bool
    threads: int

    @staticmethod
    def of(arguments: list[str]) -> Job:
        return Job(**json.loads(arguments[1]))


def finish(job: Job, scale: int, zero: int | None = None) -> None:
    """Say how many bits a weight take, with scales of ``scale`` bits and zero points of ``zero`` (None: as codes)."""
    zeros = 0 if job.symmetric and zero is None else job.bits if zero is None else zero
    print(json.dumps({"bits": job.bits + (scale + zeros) / job.group}))
