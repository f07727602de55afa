"""What the kernels move and multiply, counted from the addresses that their launches load from and store to.

    TRITON_INTERPRET=1 python benchmarks/rooflines.py                       tables
    TRITON_INTERPRET=1 python benchmarks/rooflines.py --markdown            and into docs/kernels.md
    TRITON_INTERPRET=1 python benchmarks/rooflines.py rms_norm bf16_codec   these alone

Each program of each launch runs in Triton's interpreter, at small sizes with the tiles of the kernel's table.

    minimum     bytes of inputs that must be read, and of results
    touched     32-byte sectors of inputs and results that a launch loads or stores, each once: what device memory must
                move; over the minimum
    scratch     the same of everything else, which a launch leaves to the next, in the cache if it is small
    requested   the sectors of each instruction, summed: what the caches serve
    matrix      floating-point operations of the matrix units, with padding, over those that the mathematics needs
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import benchmarks.kernels
from backends.kernels.launch import INTERPRETED, Product
from benchmarks.kernels import Case, size_of

SECTOR = 32
PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
COLUMNS = ("case", "minimum, KB", "touched", "scratch", "requested", "matrix")


@dataclass
class Trace:
    """What programs did: sectors by instruction, addresses of stored elements, operations of the matrix units."""

    loads: list[Any] = field(default_factory=list)
    stores: list[Any] = field(default_factory=list)
    elements: list[Any] = field(default_factory=list)
    flops: float = 0.0

    def load(self, pointers: Any, mask: Any) -> None:
        self.loads.append(np.unique(pointers.data[mask.data] // SECTOR))

    def store(self, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data]
        self.elements.append(addresses)
        self.stores.append(np.unique(addresses // SECTOR))

    def dot(self, a: Any, b: Any) -> None:
        self.flops += 2.0 * a.data.size * b.data.shape[-1]

    def touched(self, spans: list[tuple[int, int]]) -> tuple[int, int]:
        """Bytes inside and outside of ``spans`` of addresses."""
        sectors = np.concatenate([np.unique(np.concatenate(each)) for each in (self.loads, self.stores) if each])
        inside = np.zeros(len(sectors), bool)
        for start, end in spans:
            inside |= (sectors >= start // SECTOR) & (sectors * SECTOR < end)
        return SECTOR * int(inside.sum()), SECTOR * int((~inside).sum())

    @property
    def requested(self) -> int:
        """Bytes."""
        return SECTOR * sum(len(sectors) for sectors in self.loads + self.stores)


@contextmanager
def recorded() -> Iterator[Trace]:
    """The trace of what the interpreter runs meanwhile.

    All memory operations and products of a program pass through a few methods of the interpreter's one builder; here
    they are wrapped as attributes of that object, which hide the methods of its class until they are deleted.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    trace = Trace()
    observers: dict[str, Callable[..., None]] = {
        "create_masked_load": lambda pointers, mask, *_: trace.load(pointers, mask),
        "create_masked_store": lambda pointers, _, mask, *__: trace.store(pointers, mask),
        "create_atomic_rmw": lambda _, pointers, __, mask, *___: (
            trace.load(pointers, mask),
            trace.store(pointers, mask),
        ),
        "create_dot": lambda a, b, *_: trace.dot(a, b),
    }
    for name, observe in observers.items():
        setattr(builder, name, _observed(getattr(builder, name), observe))
    try:
        yield trace
    finally:
        for name in observers:
            delattr(builder, name)


def _observed(method: Callable[..., Any], observe: Callable[..., None]) -> Callable[..., Any]:
    def observed(*values: Any, **named: Any) -> Any:
        observe(*values)
        return method(*values, **named)

    return observed


@dataclass(frozen=True)
class Count:
    """Of one call: bytes, and floating-point operations of the matrix units over those needed, None without any.

    ``once``: each element of the results is stored exactly once.
    """

    case: str
    minimum: float
    touched: float
    scratch: float
    requested: float
    matrix: float | None
    once: bool

    @property
    def cells(self) -> tuple[str, ...]:
        matrix = "" if self.matrix is None else f"{self.matrix:.2f}"
        ratios = (f"{moved / self.minimum:.2f}" for moved in (self.touched, self.scratch, self.requested))
        return (self.case, f"{self.minimum / 1e3:.1f}", *ratios, matrix)


def counts(name: str) -> Iterator[Count]:
    """The small cases of the kernel ``name``."""
    kernel, module = (importlib.import_module(f"{package}.kernels.{name}") for package in ("backends", "benchmarks"))
    torch.manual_seed(0)
    for case in module.small("cpu"):
        yield _count(case, kernel.plan(*case.inputs))


def _count(case: Case, plan: Any) -> Count:
    traces = [_traced(launch) for launch in plan.launches]
    results = [plan.result] if isinstance(plan.result, Tensor) else list(plan.result)
    read = size_of(*case.inputs) if case.read is None else case.read
    flops = sum(trace.flops for trace in traces)
    spans = [_span(value) for value in (*case.inputs, *results) if isinstance(value, Tensor)]
    touched, scratch = (sum(parts) for parts in zip(*(trace.touched(spans) for trace in traces), strict=True))
    stored = np.concatenate([addresses for trace in traces for addresses in trace.elements])
    return Count(
        case.name,
        read + size_of(*results),
        touched,
        scratch,
        sum(trace.requested for trace in traces),
        flops / case.flops if flops else None,
        all(_once(result, stored) for result in results),
    )


def _traced(launch: Any) -> Trace:
    with recorded() as trace:
        launch.run()
    if isinstance(launch, Product):
        trace.loads += [_sectors(launch.x), _sectors(launch.weight)]
        trace.stores.append(_sectors(launch.y))
        trace.elements.append(_elements(launch.y))
        trace.flops = 2.0 * launch.x.numel() * launch.weight.shape[0]
    return trace


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of what the tensor is a view of."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def _elements(tensor: Tensor) -> Any:
    return tensor.data_ptr() + tensor.element_size() * np.arange(tensor.numel(), dtype=np.uint64)


def _sectors(tensor: Tensor) -> Any:
    return np.unique(_elements(tensor) // SECTOR)


def _once(result: Tensor, stored: Any) -> bool:
    start, end = result.data_ptr(), result.data_ptr() + result.numel() * result.element_size()
    mine = np.sort(stored[(stored >= start) & (stored < end)])
    return np.array_equal(mine, _elements(result))


def names() -> list[str]:
    """Every kernel."""
    return [module.name for module in pkgutil.iter_modules(benchmarks.kernels.__path__)]


def main() -> None:
    """Counts what the command line names."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("kernels", nargs="*", default=names())
    arguments.add_argument("--markdown", action="store_true", help=f"also rewrite the tables of {PAGE.name}")
    chosen = arguments.parse_args()
    if not INTERPRETED:
        raise SystemExit("set TRITON_INTERPRET=1: the counts come from the interpreter")
    for name in chosen.kernels:
        found = list(counts(name))
        table = Table(*COLUMNS, title=name)
        for count in found:
            table.add_row(*count.cells)
        Console(width=120).print(table)
        if chosen.markdown:
            PAGE.write_text(_with_table(PAGE.read_text(), name, found))


def _with_table(page: str, name: str, found: list[Count]) -> str:
    """The page with the table between the comments that name the kernel. Raises ValueError where they are missing."""
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines = "\n".join([*head, *(f"| {' | '.join(count.cells)} |" for count in found)])
    start, end = f"<!-- rooflines of {name} -->", "<!-- end -->"
    changed, times = re.subn(f"{start}.*?{end}", lambda _: f"{start}\n{lines}\n{end}", page, flags=re.DOTALL)
    if times != 1:
        raise ValueError(f"{PAGE.name} must hold {start} and {end} once")
    return changed


if __name__ == "__main__":
    main()
