"""Rows and sentences that the model card, the page and the terminal share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compiler.console import human_bytes, human_count, table

Document = Mapping[str, Any]
Row = tuple[str, str, str, str]

METRIC_NAMES = {
    "perplexity": "perplexity",
    "bits-per-byte": "bits per byte of text",
    "kl": "KL to the original (nats a token)",
    "agreement": "same most likely token",
    "cosine": "cosine to the original's output",
    "relative-error": "relative error of the output",
}


def summary(document: Document, path: Path) -> str:
    """What the command prints when it is done."""
    output = document["output"]
    lines = [
        table([("", "before", "after", "change"), *comparison(document)]),
        "",
        f"{path}: {output['architecture']}, {human_bytes(output['tensor_bytes'])}",
        *(f"  {note}" for note in output["loads_in"]),
        f"  {verification_sentence(document)}",
        f"  more: {path / 'compress' / 'report.html'}",
    ]
    return "\n".join(lines)


def comparison(document: Document) -> list[Row]:
    """Before, after and change of everything counted or measured."""
    before, after = document["ledger"]["before"], document["ledger"]["after"]
    rows = [
        _row("parameters", before["parameters"], after["parameters"], human_count),
        _row("bytes of weights", before["stored_bytes"], document["output"]["tensor_bytes"], human_bytes),
        _row("FLOPs a token", before["flops_per_token"], after["flops_per_token"], human_count),
        _row("cache bytes a token", before["cache_bytes_per_token"], after["cache_bytes_per_token"], human_bytes),
    ]
    return [*rows, *_measured(document["evaluation"])]


def _row(name: str, before: float, after: float, show: Any) -> Row:
    return name, show(before), show(after), f"{100 * (after / before - 1):+.1f} %" if before else ""


def _measured(evaluation: Mapping[str, Any] | None) -> list[Row]:
    if evaluation is None:
        return []
    reference = evaluation["reference"]
    return [
        (METRIC_NAMES.get(name, name), _estimate(reference.get(name)), _estimate(found), "")
        for name, found in evaluation["metrics"].items()
    ]


def _estimate(found: Mapping[str, float] | None) -> str:
    """A value with its 95 % interval."""
    if found is None:
        return ""
    return f"{found['value']:.4g} ({found['low']:.4g} to {found['high']:.4g})"


def verification_sentence(document: Document) -> str:
    """Whether the result was reloaded, and what came of it."""
    found = document["verification"]
    if not found["performed"]:
        return f"Not verified by reloading: {found['skipped']}."
    return (f"Reloaded by plain transformers: outputs equal the compiled graph's to {found['error']:.2g} "
            f"of their scale (allowed: {found['tolerance']:.2g}).")


def skips(entry: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """(reason, places) of what a pass left alone."""
    reasons: dict[str, list[str]] = {}
    for skip in entry["skipped"]:
        reasons.setdefault(skip["reason"], []).append(skip["scope"])
    return list(reasons.items())


def spelt(options: Mapping[str, Any]) -> str:
    """Options as a recipe spells them, in flow style."""
    return ", ".join(f"{name}: {_value(value)}" for name, value in options.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{spelt(value)}}}"
    return "null" if value is None else str(value)
