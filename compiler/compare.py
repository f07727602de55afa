"""Several outputs of one model beside each other: their costs, their worth, and which differences are noise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compiler.console import human_bytes, human_count, table
from compiler.errors import MISSHAPEN, CheckpointError, DataError, UsageError, nearest
from compiler.evaluate.estimates import Change, Estimate, change
from compiler.evaluate.measure import statistic_of
from compiler.report.quality import higher_is_better, metric_title, spelt_estimate

COSTS = {
    "size": "bytes of weights",
    "cache": "cache bytes a token",
    "flops": "FLOPs a token",
    "speed": "tokens/s, decoding",
}
MEASURE = "measure them now: `--data TEXT --against ORIGINAL`"


@dataclass(frozen=True)
class Output:
    """One output: what it costs, by the names of ``COSTS``, and the evaluation of its report, or one made now."""

    name: str
    costs: Mapping[str, float]
    evaluation: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Outputs in the order given; ``quality`` is the metric that they are ranked by, ``cost`` what it is held against.

    ``pairs`` maps two names to how far the quality of the second lies above that of the first, on the same items.
    """

    outputs: Sequence[Output]
    metrics: Sequence[str]
    quality: str
    cost: str
    pairs: Mapping[tuple[str, str], Change] = field(default_factory=dict[tuple[str, str], Change])

    def best(self) -> list[str]:
        """The outputs that none beats in both cost and quality."""
        return [one.name for one in self.outputs if not any(self._beats(other, one) for other in self.outputs)]

    def value(self, output: Output) -> float:
        """The quality of ``output``."""
        return output.evaluation["metrics"][self.quality]["value"]

    def _beats(self, one: Output, other: Output) -> bool:
        ours, theirs = (self._badness(each) for each in (one, other))
        return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))

    def _badness(self, output: Output) -> tuple[float, float]:
        cost, value = output.costs[self.cost], self.value(output)
        return -cost if self.cost == "speed" else cost, -value if higher_is_better(self.quality) else value

    def to_dict(self) -> dict[str, Any]:
        """Plain data, fit for JSON."""
        pairs = [{"one": one, "other": other, **asdict(found)} for (one, other), found in self.pairs.items()]
        outputs = [{"name": one.name, "costs": dict(one.costs), "metrics": self._metrics(one)} for one in self.outputs]
        return {
            "quality": self.quality, "cost": self.cost, "outputs": outputs, "pairs": pairs, "best": self.best()
        }  # fmt: skip

    def _metrics(self, output: Output) -> dict[str, Any]:
        return {name: output.evaluation["metrics"][name] for name in self.metrics}


def read_output(path: Path) -> Output:
    """An output directory with its report. Raises CheckpointError when it has none."""
    file = path / "compress" / "report.json"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        ledger = document["ledger"]["after"]
        costs = {
            "size": float(document["output"]["tensor_bytes"]),
            "cache": float(ledger["cache_bytes_per_token"]),
            "flops": float(ledger["flops_per_token"]),
        }
        original = document.get("inputs", {}).get("model", {}).get("files")  # hashes: the name may be another's too
        evaluation = document["evaluation"] or {"metrics": {}}
        _check_evaluation(evaluation)
        return Output(path.name, costs, {"against": original, **evaluation})
    except (OSError, *MISSHAPEN) as reason:
        raise CheckpointError(
            "is no output of compress-model: it has no report that can be read",
            where=str(file),
            remedy="name directories that `compress-model RECIPE -o OUT` has written",
        ) from reason


def _check_evaluation(evaluation: Mapping[str, Any]) -> None:
    """Raises TypeError, ValueError or LookupError where an evaluation is not what was written."""
    for estimate in evaluation["metrics"].values():
        Estimate(**{name: float(value) for name, value in estimate.items()})
    for name, rows in evaluation.get("rows", {}).items():
        if rows and np.array(rows, np.float64).ndim != 2:
            raise ValueError(f"the rows of {name} are no table")
    if evaluation["metrics"] and not 0 <= int(evaluation["inputs"].get("seed", 0)) < 1 << 63:
        raise ValueError("the seed is no seed")


def compare(outputs: Sequence[Output], *, quality: str | None = None, cost: str = "size") -> Comparison:
    """``outputs`` beside each other, by the metrics that all have; ``quality`` is the first of them unless given.

    Raises UsageError when names repeat, DataError when nothing was measured of all alike.
    """
    names = [output.name for output in outputs]
    if len(set(names)) < len(names):
        raise UsageError("two outputs have the same name", remedy="rename one of the directories")
    first, *others = (output.evaluation["metrics"] for output in outputs)
    shared = [name for name in first if all(name in each for each in others)]
    _check_alike(outputs, shared)
    if quality is not None and quality not in shared:
        raise DataError(f"not all outputs have `{quality}`", remedy=nearest(quality, shared))
    ranked = quality or shared[0]
    return Comparison(outputs, shared, ranked, cost, _pairs(outputs, ranked))


def _check_alike(outputs: Sequence[Output], shared: Sequence[str]) -> None:
    """Raises DataError when nothing was measured of all outputs, or not alike: on the same data, in the same dtype, and
    metrics that only a comparison gives against the same original."""
    if not shared:
        raise DataError("no metric was measured of all outputs", remedy=MEASURE)
    alike = {"inputs": "evaluated on different data", "dtype": "evaluated in different dtypes"}
    if any(name not in output.evaluation.get("reference", {}) for output in outputs for name in shared):
        alike["against"] = "compared with different originals"
    for name, cause in alike.items():
        first, *others = (output.evaluation.get(name) for output in outputs)
        if any(each != first for each in others):
            raise DataError(f"the outputs were {cause}", remedy=MEASURE)


def _pairs(outputs: Sequence[Output], quality: str) -> dict[tuple[str, str], Change]:
    """The paired difference of every two outputs of which the rows were kept."""
    rows = {output.name: output.evaluation.get("rows", {}).get(quality) for output in outputs}
    known = {name: np.array(found, np.float64) for name, found in rows.items() if found is not None}
    seed = outputs[0].evaluation["inputs"].get("seed", 0)
    statistic = statistic_of(quality)
    pairs = ((one, other) for index, one in enumerate(known) for other in list(known)[index + 1 :])
    return {
        (one, other): change(known[other], known[one], statistic, seed)
        for one, other in pairs
        if known[one].shape == known[other].shape
    }


def comparison_text(found: Comparison) -> str:
    """The comparison as a table, and a sentence for each pair."""
    timed = all("speed" in output.costs for output in found.outputs)
    untimed = [] if timed else ["speeds were not measured: `--speed` times all in turns"]
    return "\n".join([table(comparison_rows(found)), "", *sentences(found), *untimed])


def comparison_rows(found: Comparison) -> list[tuple[str, ...]]:
    """The comparison as a table: a header, then a row for each output. What none of them costs is left out."""
    costs = [name for name in COSTS if any(output.costs.get(name) for output in found.outputs)]
    header = ("", *(COSTS[name] for name in costs), *(metric_title(name) for name in found.metrics))
    rows = [
        (
            output.name,
            *(spelt_cost(name, output.costs[name]) for name in costs),
            *(spelt_estimate(output.evaluation["metrics"][name]) for name in found.metrics),
        )
        for output in found.outputs
    ]
    return [header, *rows]


def sentences(found: Comparison) -> list[str]:
    """What the pairs and the picture say."""
    title = metric_title(found.quality)
    lines = [_pair(title, one, other, each) for (one, other), each in found.pairs.items()]
    best = f"best for their {COSTS[found.cost]} by {title}: {', '.join(found.best())}"
    return [*lines, best, "intervals are 95 %; differences are paired over the same items"]


def _pair(title: str, one: str, other: str, found: Change) -> str:
    interval = "" if found.low == found.high else f" ({found.low:+.4g} to {found.high:+.4g})"
    ends = {"within": "within noise", "beyond": "beyond noise", "unknown": "too few to tell from noise"}
    return f"{title}, {other} less {one}: {found.value:+.4g}{interval}, {ends[found.noise]}"


def spelt_cost(name: str, value: float) -> str:
    """A cost as a person reads it."""
    if name == "speed":
        return f"{value:.1f}"
    return human_count(value) if name == "flops" else human_bytes(value)
