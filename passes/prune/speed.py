"""The budget of ``faster``: seconds, by a table of the runtime's latencies (ZipLM, arXiv 2302.04089)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from compiler.errors import PassError
from compiler.ir.graph import Graph, Value
from compiler.ir.types import TensorType
from compiler.latency import Latency, Table, Task, Workload
from compiler.latency.table import Measure
from compiler.pipeline import Context
from compiler.rewrite.removal import shrunk
from passes.prune.choose import Choice, Counts, options
from passes.prune.depth import Block
from passes.prune.places import Place

if TYPE_CHECKING:
    from passes.prune import Prune

KEPT = "latency"
"""The name under which a table is kept for a run that goes on, and written beside the report."""


class Seconds:
    """A budget of ``most`` seconds, 1 / ``faster`` of what the model takes now."""

    option = "faster"

    def __init__(self, latency: Latency, faster: float) -> None:
        self.latency = latency
        self.whole = latency.seconds({})
        self.most = self.whole / faster
        self.cost = cache(self._cost)

    @property
    def guessed(self) -> bool:
        """Whether multiplications stand for the seconds that only the run will know."""
        return self.latency.table.measure is _multiplications

    def _cost(self, place: Place, count: int) -> float:
        changed = types_with({place: count})
        return self.latency.seconds(changed, self.latency.touched(changed))

    def total(self, counts: Counts, gone: Sequence[Block]) -> float:
        nodes = self.latency.without({block.leaves: block.enters for block in gone})
        return self.latency.seconds(types_with(counts), nodes)


def types_with(counts: Counts) -> Mapping[Value, TensorType]:
    """The types of all values of the places in ``counts`` when so many indices of each remain."""
    return shrunk({group: count for place, count in counts.items() for group in place.groups})


def budget_of(graph: Graph, ctx: Context, wanted: Prune, places: Sequence[Place]) -> Seconds:
    """What ``wanted.faster`` allows. All that choices may need is looked up, or measured, at once.

    Raises PassError when the table that was given lacks something, or the runtime is not installed.
    """
    table = _table(ctx, wanted)
    about = _workload(ctx, wanted, table)
    latency = Latency(graph, table, about["batch"], about["tokens"])
    latency.prepare(types_with({place: n}) for place in places for n in options(place, wanted.align))
    budget = Seconds(latency, wanted.faster)
    if not budget.whole:
        raise PassError(
            "by the table of latencies the model takes no time",
            option="latency",
            remedy="measure the table again: leave out `latency`",
        )
    return budget


def _table(ctx: Context, wanted: Prune) -> Table:
    if wanted.latency is not None:
        return Table.read(wanted.latency)
    workload = Workload(wanted.runtime, wanted.batch, wanted.tokens, wanted.threads)
    if ctx.planned:
        ctx.skipped("", "latencies are measured in the run: this plan goes by the number of multiplications")
        return Table(asdict(workload), measure=_multiplications)
    from compiler.latency.measure import measuring

    kept = ctx.progress.load(KEPT) or {}
    table = Table(asdict(workload), {name: float(seconds) for name, seconds in kept.items()})
    table.measure = partial(_measured, ctx, table, measuring(workload))
    return table


def _workload(ctx: Context, wanted: Prune, table: Table) -> dict[str, Any]:
    """What ``table`` says it was measured with, and the options where it does not say.

    Raises PassError where an option is given that says otherwise.
    """
    found: dict[str, Any] = {}
    for name, default in asdict(Workload()).items():
        own = getattr(wanted, name)
        found[name] = table.about.get(name, own)
        if found[name] == own:
            continue
        if own != default:
            raise PassError(
                f"the table of latencies is of `{name}: {found[name]}`, not of `{name}: {own}`",
                option=name,
                remedy="leave the option out, or bring a table that was measured with it",
            )
        if isinstance(default, int) and (type(found[name]) is not int or found[name] < 1):
            raise PassError(
                f"the table of latencies is of `{name}: {found[name]}`, no number",
                option="latency",
                remedy="measure the table again: leave out `latency`",
            )
        ctx.skipped("", f"`{name}` is {found[name]}, as the table of latencies says")
    return found


def _multiplications(tasks: Sequence[Task]) -> list[float]:
    return [float(task.products) for task in tasks]


def _measured(ctx: Context, table: Table, measure: Measure, tasks: Sequence[Task]) -> Sequence[float]:
    """What ``measure`` finds, kept for a run that goes on: the sizes that it chooses are then the same."""
    found = measure(tasks)
    known = {**table.seconds, **dict(zip(map(str, tasks), found, strict=True))}
    ctx.progress.save(KEPT, {name: torch.tensor(seconds, dtype=torch.float64) for name, seconds in known.items()})
    return found


def report_speed(ctx: Context, budget: Seconds, choice: Choice) -> None:
    """Say how fast the choice is predicted to be, and leave the table that it went by."""
    left = budget.total(choice.counts, choice.gone)
    speed = f"{budget.whole / left:.2f} times as fast"
    if budget.guessed:
        ctx.rewrote("", f"{speed} by the number of multiplications")
        return
    ctx.rewrote(
        "",
        f"{speed} by the table of latencies",
        milliseconds_before=1e3 * budget.whole,
        milliseconds_after=1e3 * left,
    )
    ctx.record(KEPT, budget.latency.table.document())
