"""Each kernel on the GPU of this machine: against what the memory and the arithmetic units allow, and against others.

    python benchmarks/gpu.py                        every kernel
    python benchmarks/gpu.py packed_linear --tiles  every tile of the candidates, for the tables in backends/kernels

Times are of replayed CUDA graphs, medians of interleaved rounds, over as many copies of the inputs as exceed the
cache. ``floor`` is the time in which this GPU copies the bytes that must move, or does the arithmetic if that takes
longer; both rates are measured first. Ratios to others above 1 mean that the kernel here is faster.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import pkgutil
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks.kernels
from backends.kernels.launch import Plan
from benchmarks.kernels import Case, size_of

BEYOND_CACHE = 256e6
MOST_COPIES = 48
ROUNDS = 15
WORKERS = 12


@dataclass(frozen=True)
class Rates:
    """Bytes and bf16 floating-point operations a second that this GPU reaches."""

    memory: float
    arithmetic: float

    def floor(self, case: Case, result: Any) -> float:
        """Seconds that the call takes at least."""
        read = case.read if case.read is not None else size_of(*case.inputs)
        return max((read + size_of(*_several(result))) / self.memory, case.flops / self.arithmetic)


@dataclass(frozen=True)
class Row:
    """Seconds of one call; ``error`` relative to the reference; ``eager`` without a graph; ``peers`` in seconds."""

    kernel: str
    case: str
    seconds: float
    floor: float
    error: float
    eager: float
    peers: dict[str, float]


def main() -> None:
    """Measures what the command line names."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("kernels", nargs="*", default=_names())
    arguments.add_argument("--tiles", action="store_true", help="time every candidate tile of each case")
    arguments.add_argument("--json", type=Path, help="also write the rows to this file")
    chosen = arguments.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: not measured")
    torch.manual_seed(0)
    if chosen.tiles:
        _compile_all(chosen.kernels)
    rates = measured_rates()
    print(f"{torch.cuda.get_device_name()}: {rates.memory / 1e12:.2f} TB/s, {rates.arithmetic / 1e12:.0f} TFLOP/s bf16")
    for name in chosen.kernels:
        (_print_tiles if chosen.tiles else _print_rows)(name, rates, chosen.json)


def measured_rates() -> Rates:
    """A large copy, counting bytes read and written, and a large matrix product, both of random data."""
    wide = torch.randn(1 << 28, device="cuda", dtype=torch.float32)
    copy = torch.empty_like(wide)
    one, other = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = graph_times({"copy": [lambda: copy.copy_(wide)], "product": [lambda: one @ other]})
    return Rates(2 * size_of(wide) / times["copy"], 2 * 8192**3 / times["product"])


def graph_times(calls: dict[str, list[Callable[[], Any]]]) -> dict[str, float]:
    """Seconds of a call by name: each name's calls are one CUDA graph; the graphs are replayed in turn.

    What does not fit into the GPU's memory is left out.
    """
    graphs = {name: graph for name, several in calls.items() if (graph := _captured(several)) is not None}
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            times[name].append(_seconds(graph.replay) / len(calls[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def _captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph | None:
    """The calls as a graph; None where the GPU's memory does not hold what they make."""
    try:
        return _graph_of(calls)
    except torch.OutOfMemoryError:
        return None


def _graph_of(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _seconds(call: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def rows(name: str, rates: Rates) -> Iterator[Row]:
    """A row for each case of the kernel ``name``."""
    kernel, module = _modules(name)
    for case in module.cases("cuda"):
        inputs = list(_copies(case))
        calls = {"ours": [_run(kernel.plan(*each)) for each in inputs]}
        result = calls["ours"][0]()
        for peer in case.peers(*case.inputs):
            calls[peer] = [case.peers(*each)[peer] for each in inputs]
        times = graph_times(calls)
        call = partial(getattr(kernel, name), *case.inputs)
        eager = statistics.median(_seconds(call) for _ in range(ROUNDS))
        error = _error(result, kernel.reference(*case.inputs))
        yield Row(name, case.name, times.pop("ours"), rates.floor(case, result), error, eager, times)


def _print_rows(name: str, rates: Rates, path: Path | None) -> None:
    table = Table("case", "µs", "floor µs", "of floor", "error", "eager µs", "others: times slower", title=name)
    found = []
    try:
        for row in rows(name, rates):
            found.append(row)
            others = ", ".join(f"{peer} {seconds / row.seconds:.2f}" for peer, seconds in row.peers.items())
            times = [f"{seconds * 1e6:.1f}" for seconds in (row.seconds, row.floor)]
            share = f"{row.floor / row.seconds:.0%}"
            table.add_row(row.case, *times, share, f"{row.error:.1e}", f"{row.eager * 1e6:.0f}", others)
    except Exception:  # one kernel that fails must not cost the measurements of the others
        traceback.print_exc(limit=6)
    Console(width=150).print(table)
    if path:
        kept = json.loads(path.read_text()) if path.exists() else []
        path.write_text(json.dumps([*kept, *(asdict(row) for row in found)], indent=1))


def _print_tiles(name: str, rates: Rates, path: Path | None) -> None:
    kernel, module = _modules(name)
    if not hasattr(module, "candidates"):
        return
    for case in module.cases("cuda"):
        inputs = list(_copies(case))
        found = {}
        for tile in [None, *module.candidates(*case.inputs)]:
            try:
                calls = [_run(kernel.plan(*each, tile=tile)) for each in inputs]
                found[str(tile)] = graph_times({"": calls})[""]
            except Exception as error:  # a tile that does not fit is no candidate
                print(f"{name}, {case.name}, {tile}: {type(error).__name__} {str(error)[:80]}")
        floor = rates.floor(case, kernel.plan(*case.inputs).run())
        print(f"{name}, {case.name}: floor {floor * 1e6:.1f} µs, table {found.get('None', 0) * 1e6:.1f} µs")
        for tile, seconds in sorted(found.items(), key=lambda item: item[1])[:4]:
            print(f"    {seconds * 1e6:8.1f} µs  {floor / seconds:4.0%}  {tile}")


def _compile_all(names: list[str]) -> None:
    """Compiles every candidate into Triton's cache, many at a time."""
    work = [(name, share) for name in names for share in range(WORKERS)]
    with ProcessPoolExecutor(WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_share, work))


def _compile_share(work: tuple[str, int]) -> None:
    name, share = work
    kernel, module = _modules(name)
    if not hasattr(module, "candidates"):
        return
    todo = [(case, tile) for case in module.cases("cuda") for tile in module.candidates(*case.inputs)]
    for case, tile in todo[share::WORKERS]:
        try:
            kernel.plan(*case.inputs, tile=tile).run()
        except Exception:  # reported where it is timed
            continue


def _run(plan: Plan) -> Callable[[], Any]:
    return plan.run


def _copies(case: Case) -> Iterator[tuple[Any, ...]]:
    """Inputs of equal values, enough of them that none is in the cache when its turn comes again."""
    count = min(MOST_COPIES, max(1, round(BEYOND_CACHE / max(size_of(*case.inputs), 1))))
    yield case.inputs
    for _ in range(count - 1):
        yield tuple(value.clone() if isinstance(value, Tensor) else value for value in case.inputs)


def _error(actual: Any, expected: Any) -> float:
    pairs = zip(_several(actual), _several(expected), strict=True)
    return max(
        (one.double() - two.double()).norm().item() / max(two.double().norm().item(), 1e-30) for one, two in pairs
    )


def _several(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


def _modules(name: str) -> tuple[ModuleType, ModuleType]:
    return importlib.import_module(f"backends.kernels.{name}"), importlib.import_module(f"benchmarks.kernels.{name}")


def _names() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(benchmarks.kernels.__path__)]


if __name__ == "__main__":
    main()
