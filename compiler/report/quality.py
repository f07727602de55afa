"""Names and rows of what was measured, that the model card, the page and the terminal share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = tuple[str, str, str, str]

METRIC_NAMES = {
    "perplexity": "perplexity",
    "bits-per-byte": "bits per byte of text",
    "calibration-error": "calibration error",
    "kl": "KL to the original (nats a token)",
    "agreement": "same most likely token",
    "perplexity-by-position": "perplexity of tokens",
    "kl-by-position": "KL to the original of tokens",
    "agreement-by-position": "same most likely token at",
    "generation": "greedy answers",
    "choices": "multiple choice",
    "cosine": "cosine to the original's output",
    "relative-error": "relative error of the output",
    "similarity": "rank correlation with the original's similarities",
    "ratings": "rank correlation with people's ratings",
    "neighbours": "10 nearest neighbours",
    "probe": "linear probe",
    "word-errors": "word error rate",
}
LOWER = ("perplexity", "bits-per-byte", "calibration-error", "kl", "relative-error", "word-errors")
NOISE = {"within": " (within noise)", "beyond": "", "unknown": " (too few to tell from noise)"}


def metric_title(name: str) -> str:
    """A metric's name as a person reads it, and the part of it that the name says."""
    metric, _, part = name.partition(": ")
    title = METRIC_NAMES.get(metric, metric)
    return f"{title} {part}" if "-by-position" in metric else f"{title}: {part}" if part else title


def higher_is_better(name: str) -> bool:
    """Whether more of a metric is better."""
    metric, _, part = name.partition(": ")
    return part != "repetition" and metric.removesuffix("-by-position") not in LOWER


def measured_rows(found: Mapping[str, Any] | None) -> list[Row]:
    """Rows of what an evaluation measured; empty cells where there is no reference."""
    if found is None:
        return []
    changes = found.get("changes", {})
    rows = [
        _metric(name, found["reference"].get(name), estimate, changes.get(name))
        for name, estimate in found["metrics"].items()
    ]
    if found["cache"] is None:
        return rows
    theirs, ours = found["reference_cache"] or {}, found["cache"]
    names = {
        "values_per_token": "cached values a token, live",
        "bytes_per_token": f"cached bytes a token, live, in {found['dtype']}",
    }
    return [*((name, _count(theirs.get(key)), _count(ours[key]), "") for key, name in names.items()), *rows]


def _metric(
    name: str, before: Mapping[str, float] | None, after: Mapping[str, float], changed: Mapping[str, Any] | None
) -> Row:
    change = "" if not before or not before["value"] else f"{100 * (after['value'] / before['value'] - 1):+.2f} %"
    noise = NOISE[changed["noise"]] if changed else ""
    return metric_title(name), spelt_estimate(before), spelt_estimate(after), f"{change}{noise}".strip()


def spelt_estimate(found: Mapping[str, float] | None) -> str:
    """A value with its 95 % interval; without one where all items, or the only one, say the same."""
    if found is None:
        return ""
    interval = "" if found["low"] == found["high"] else f" ({found['low']:.4g} to {found['high']:.4g})"
    return f"{found['value']:.4g}{interval}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
