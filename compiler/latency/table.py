"""Tables of seconds by task: measured, kept, brought along."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from compiler.errors import MISSHAPEN, PassError
from compiler.latency.task import Task

Runtime = Literal["onnxruntime", "torch"]
Measure = Callable[[Sequence[Task]], Sequence[float]]
SHOWN = 3


def _seconds(task: str, microseconds: float) -> float:
    """Raises PassError for what no operation can take."""
    if not math.isfinite(microseconds) or microseconds < 0:
        cause = f"the table of latencies says that {task} takes {microseconds} microseconds"
        raise PassError(cause, option="latency", remedy="measure it again: times are finite and not negative")
    return microseconds * 1e-6


@dataclass(frozen=True)
class Workload:
    """What is computed at once, and by what: ``batch`` samples of ``tokens`` tokens, on ``threads`` threads."""

    runtime: Runtime = "onnxruntime"
    batch: int = 1
    tokens: int = 128
    threads: int = 1


@dataclass
class Table:
    """``seconds`` by task, and ``about`` what they were measured.

    What it lacks is measured by ``measure``; without one it is an error.
    """

    about: Mapping[str, Any]
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    measure: Measure | None = None

    @classmethod
    def read(cls, path: Path) -> Table:
        """The table in ``path``: JSON, microseconds by task under the key `microseconds`. Raises PassError."""
        try:
            about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found: Mapping[str, Any] = about.pop("microseconds")
            return cls(about, {name: _seconds(name, float(value)) for name, value in found.items()})
        except OSError as reason:
            cause = f"cannot read {path.name}: {reason.strerror}"
            raise PassError(cause, option="latency", remedy="name a file that may be read") from reason
        except MISSHAPEN as reason:
            raise PassError(
                f"{path.name} is no table of latencies",
                option="latency",
                remedy='it looks like {"microseconds": {"linear(f32[1,128,64], @f32[256,64])": 41.5}}',
            ) from reason

    def document(self) -> dict[str, Any]:
        """What ``read`` reads."""
        return {**self.about, "microseconds": {name: 1e6 * value for name, value in self.seconds.items()}}

    def add(self, tasks: Iterable[Task]) -> None:
        """See to it that the table holds ``tasks``. Raises PassError when it does not and nothing can measure."""
        wanted = {str(task): task for task in tasks}
        missing = [task for name, task in wanted.items() if name not in self.seconds]
        if missing and self.measure is None:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise PassError(
                f"the table of latencies lacks {', '.join(map(str, missing[:SHOWN]))}{more}",
                option="latency",
                remedy="measure these on the device as well, or leave `latency` out to measure all of them here",
            )
        if missing and self.measure is not None:
            found = self.measure(missing)
            self.seconds.update((str(task), value) for task, value in zip(missing, found, strict=True))

    def of(self, task: Task) -> float:
        """The seconds of ``task``."""
        self.add([task])
        return self.seconds[str(task)]
