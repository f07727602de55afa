"""Observers of a pipeline: time and memory, graphs written after passes."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compiler.errors import CompressError
from compiler.ir.graph import Graph
from compiler.pipeline import Observer, Pass, PassReport


def peak_rss() -> int:
    """The largest resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss() -> int:
    """The resident memory of this process now, in bytes; where the system does not tell, its largest so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return peak_rss()
    return pages * resource.getpagesize()


def give_back() -> None:
    """Hand memory that was freed back to the system; glibc keeps what lies between pieces that are in use."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Timing(Observer):
    """Fills in each pass's seconds and the process's peak memory after it."""

    def __init__(self) -> None:
        self._started = 0.0

    def before(self, index: int, step: Pass, graph: Graph) -> None:
        self._started = time.perf_counter()

    def after(self, index: int, step: Pass, graph: Graph, report: PassReport) -> None:
        report.seconds = time.perf_counter() - self._started
        report.peak_rss = peak_rss()


class DumpGraphs(Observer):
    """Writes the graph before the first pass and after each: ``000_captured.mir``, ``001_gqa-to-mla.mir``, …

    When a pass fails, the graph as it left it is ``002_quantize.failed.mir``.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def before(self, index: int, step: Pass, graph: Graph) -> None:
        if index == 0:
            self._write("000_captured", graph)

    def after(self, index: int, step: Pass, graph: Graph, report: PassReport) -> None:
        self._write(f"{index + 1:03}_{step.key()}", graph)

    def failed(self, index: int, step: Pass, graph: Graph, error: CompressError) -> None:
        self._write(f"{index + 1:03}_{step.key()}.failed", graph)

    def _write(self, name: str, graph: Graph) -> None:
        from compiler.ir.text import print_graph

        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / f"{name}.mir").write_text(print_graph(graph, weights=True), encoding="utf-8")


class Narrate(Observer):
    """Says in a line what each pass did, and what it warns of."""

    def __init__(self, say: Callable[[str], Any]) -> None:
        self._say = say

    def after(self, index: int, step: Pass, graph: Graph, report: PassReport) -> None:
        skipped = f", {len(report.skipped)} skipped" if report.skipped else ""
        self._say(f"{step.key()}: {len(report.rewritten)} rewritten{skipped}")
        for warning in report.warnings:
            self._say(f"{step.key()}: warning: {warning}")
