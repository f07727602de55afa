"""The tables that mla.py prints of what it found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.common import show


def report(found: dict[str, Any]) -> None:
    """Print tables: loss above the original by text, the distances from it, and the costs."""
    names = found["settings"]["texts"]
    base = {name: mean(found["original"]["texts"][name]) for name in names}
    head = ["method", "setting", "seed", "cache"]
    increases, distances = [[*head, *names]], [[*head, *(f"{name}: ppl / KL / agreement" for name in names)]]
    costs = [[*head, "CPU s", "of it converting", "peak MiB", "decoder matrices"]]
    increases.append(["original", "", "", f"{found['original']['cache']:g}", *(f"{base[name]:.4f}" for name in names)])
    for row in found["methods"]:
        cells = [row["method"], setting_text(row["setting"]), str(row["seed"]), cache_text(row)]
        increases.append([*cells, *(f"{mean(row['texts'][name]['losses']) - base[name]:+.4f}" for name in names)])
        distances.append([*cells, *(distance_text(row["texts"][name]) for name in names)])
        growth = row["linear_parameters"] / found["original"]["linear_parameters"] - 1
        inner = f"{row['convert_cpu_seconds']:.0f}" if "convert_cpu_seconds" in row else "not measured"
        costs.append([*cells, f"{row['cpu_seconds']:.0f}", inner, f"{row['peak_rss'] / 2**20:.0f}", f"{growth:+.1%}"])
    show("Loss above the original, nats per token (first row: the original's loss)", increases)
    against = shares(found, base)
    if len(against) > 1:
        show(
            "Loss above the original as a share of TransMLA's with at least as many cached values, means over seeds",
            against,
        )
    show("Perplexity, KL(original || converted) in nats, agreement on the most likely token", distances)
    show("Costs of conversion", costs)


def shares(found: dict[str, Any], base: dict[str, float]) -> list[list[str]]:
    """Rows for the other methods, each beside TransMLA with as many values or the next larger number it has."""
    rises: dict[tuple[str, str, float], list[list[float]]] = {}
    for row in found["methods"]:
        key = (row["method"], setting_text(row["setting"]), row["cache"])
        rises.setdefault(key, []).append([mean(row["texts"][name]["losses"]) - loss for name, loss in base.items()])
    averaged = {key: [mean(column) for column in zip(*rows, strict=True)] for key, rows in rises.items()}
    theirs = {cache: rise for (method, _, cache), rise in averaged.items() if method == "transmla"}
    table = [["method", "setting", "cache", *base]]
    for (method, setting, cache), rise in averaged.items():
        as_large = [held for held in theirs if held > cache - 0.5]  # some live caches count their own counters
        if method != "transmla" and as_large:
            parts = [f"{ours / peer:.2f}" for ours, peer in zip(rise, theirs[min(as_large)], strict=True)]
            table.append([method, setting, f"{cache:g}", *parts])
    return table


def mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def setting_text(setting: dict[str, Any]) -> str:
    shown = {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in setting.items()}
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def cache_text(row: dict[str, Any]) -> str:
    return "none" if row["cache"] is None else f"{row['cache']:g} {'live' if row['live'] else 'counted'}"


def distance_text(text: dict[str, Any]) -> str:
    return f"{math.exp(mean(text['losses'])):.2f} / {text['kl']:.3f} / {text['agreement']:.3f}"
