"""Passes, the context they work in, and the pipeline that runs them and keeps account.

A pass is a frozen dataclass: its fields are its options, its docstring is its help, and ``run`` edits the graph.
The pipeline verifies the graph after every pass, counts parameters and bytes before and after, and reports what
was rewritten and what was skipped, with reasons.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from compiler.errors import CompressError, OrderError, PassError, SelectorError
from compiler.ir.graph import Graph, Param
from compiler.ir.layers import copy_of
from compiler.ir.verify import signature, verify
from compiler.ledger import Bytes, Ledger, Matrix, bytes_by_layer, matrices, measure
from compiler.weights.expr import Expr, load
from compiler.weights.spill import Progress, SpillSource

if TYPE_CHECKING:
    from compiler.ir.select import Selector


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of the graph. Subclasses are frozen dataclasses whose fields are the options of the recipe key.

    ``exact_when``: the options at which what the model computes stays the same; {} when it does with any options,
    None when with none. ``edits_weights``: it needs dense weights, so it may not follow a pass that
    quantises. ``compares``: it asks for the graph as it was before the first pass.
    """

    exact_when: ClassVar[Mapping[str, Any] | None] = {}
    edits_weights: ClassVar[bool] = True
    quantises: ClassVar[bool] = False
    compares: ClassVar[bool] = False

    @property
    def calibrated(self) -> bool:
        """Whether these options ask for calibration data."""
        return False

    @property
    def packages(self) -> tuple[str, ...]:
        """Packages beyond those of every run whose versions these options make the output depend on."""
        return ()

    @classmethod
    def key(cls) -> str:
        """The recipe key: ``GqaToMla`` is ``gqa-to-mla``."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    @property
    def exact(self) -> bool:
        """Whether these options change nothing that the model computes."""
        if self.exact_when is None:
            return False
        return all(getattr(self, name) == value for name, value in self.exact_when.items())

    def options(self) -> dict[str, Any]:
        """The options as a recipe spells them."""
        return {f.name.replace("_", "-"): getattr(self, f.name) for f in dataclasses.fields(self)}

    @abstractmethod
    def run(self, graph: Graph, ctx: Context) -> None:
        """Edit ``graph``. Raises PassError when the recipe asks what this model cannot give."""


@dataclass(frozen=True)
class Rewrite:
    """One place that a pass changed."""

    scope: str
    what: str
    numbers: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Skip:
    """One place that a pass left alone, and why."""

    scope: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """What a selector matched."""

    selector: str
    count: int


@dataclass(frozen=True)
class Trial:
    """A choice that a pass weighed by its distance from the original on calibration data, smaller being better."""

    what: str
    distance: float
    chosen: bool


@dataclass(frozen=True)
class Curve:
    """What a place would lose, by prediction, with each part of it ``kept`` (0 to 1), and the part it got."""

    scope: str
    kept: Sequence[float]
    lost: Sequence[float]
    chosen: float


@dataclass
class PassReport:
    """What one pass did. ``records`` are documents that it leaves beside the report.

    ``seconds`` and ``peak_rss`` (bytes) are filled in by an observer that measures them.
    """

    name: str
    options: Mapping[str, Any]
    exact: bool
    before: Ledger
    after: Ledger
    selected: list[Selection] = field(default_factory=list[Selection])
    rewritten: list[Rewrite] = field(default_factory=list[Rewrite])
    skipped: list[Skip] = field(default_factory=list[Skip])
    trials: list[Trial] = field(default_factory=list[Trial])
    curves: list[Curve] = field(default_factory=list[Curve])
    warnings: list[str] = field(default_factory=list[str])
    records: dict[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    seconds: float | None = None
    peak_rss: int | None = None


@dataclass
class Report:
    """What a pipeline did. ``layers_before`` and ``layers_after`` are stored bytes by layer, and ``matrices_…``
    those of each matrix.

    ``read_weights`` says whether any pass looked at a weight's value; ``written_cache`` is what the class that is
    written caches of a token, in bytes, where it rounds that.
    """

    before: Ledger
    layers_before: Mapping[str, int] = field(default_factory=dict[str, int])
    layers_after: Mapping[str, int] = field(default_factory=dict[str, int])
    matrices_before: Sequence[Matrix] = ()
    matrices_after: Sequence[Matrix] = ()
    passes: list[PassReport] = field(default_factory=list[PassReport])
    read_weights: bool = False
    written_cache: int | None = None

    @property
    def after(self) -> Ledger:
        ledger = self.passes[-1].after if self.passes else self.before
        return ledger if self.written_cache is None else replace(ledger, cache_bytes_per_token=self.written_cache)


Calibration = Callable[[Graph], Sequence[Mapping[str, Tensor]]]


def no_calibration(graph: Graph) -> Sequence[Mapping[str, Tensor]]:
    """Raises PassError: the run was given no calibration data."""
    raise PassError("this needs calibration data", remedy="add `calibration: {data: text.txt}`")


class Observer:
    """Hooks around each pass. ``index`` counts passes from 0."""

    def before(self, index: int, step: Pass, graph: Graph) -> None:
        """``step`` is about to run."""

    def after(self, index: int, step: Pass, graph: Graph, report: PassReport) -> None:
        """``step`` has run and the graph verified."""

    def failed(self, index: int, step: Pass, graph: Graph, error: CompressError) -> None:
        """``step`` raised ``error``, which may be annotated; it is raised again."""


class Context:
    """What a pass may ask for while it runs, and where it says what it did.

    In a planned run no weight is read: ``read`` yields meta tensors, which have a type but no values.
    ``original`` is the graph as it was before the first pass, if the pass ``compares``; ``progress`` keeps what an
    interrupted run, repeated, goes on from.
    """

    def __init__(
        self,
        graph: Graph,
        original: Graph,
        step: Pass,
        report: PassReport,
        spill: SpillSource,
        progress: Progress,
        planned: bool,
        calibration: Calibration,
    ) -> None:
        self.planned = planned
        self.original = original
        self.progress = progress
        self._calibration = calibration
        self.read_weights = False
        self._graph = graph
        self._step = step
        self._report = report
        self._spill = spill

    def select(self, where: Selector, *, skip: Sequence[str] = ()) -> list[Param]:
        """The parameters that ``where`` selects and ``skip`` does not, in graph order.

        Raises SelectorError, naming the option, when there are none or not as many as ``expect`` demands.
        """
        from compiler.ir.select import resolve

        try:
            params = resolve(self._graph, where, skip)
        except SelectorError as error:
            error.option = error.option or self._option_holding(where)
            raise
        self._report.selected.append(Selection(_selector_text(where), len(params)))
        return params

    def rewrote(self, scope: str, what: str, **numbers: float) -> None:
        """Report that ``scope`` was changed."""
        self._report.rewritten.append(Rewrite(scope, what, numbers))

    def skipped(self, scope: str, reason: str) -> None:
        """Report that ``scope`` was left alone."""
        self._report.skipped.append(Skip(scope, reason))

    @property
    def first_skipped(self) -> str:
        """The first place that was left alone and why, for an error that says that nothing else was there; or ""."""
        return next((f"{skip.scope}: {skip.reason}" for skip in self._report.skipped), "")

    def tried(self, what: str, distance: float, chosen: bool) -> None:
        """Report a choice that was weighed."""
        self._report.trials.append(Trial(what, distance, chosen))

    def weighed(self, scope: str, kept: Sequence[float], lost: Sequence[float], chosen: float) -> None:
        """Report what ``scope`` would lose with each part of it kept, and the part that it got."""
        self._report.curves.append(Curve(scope, kept, lost, chosen))

    def warn(self, text: str) -> None:
        """Report what was done as asked, and may not be what was wanted."""
        self._report.warnings.append(text)

    def record(self, name: str, document: Mapping[str, Any]) -> None:
        """Leave ``document`` beside the report, as JSON: measurements that choices went by."""
        self._report.records[name] = document

    def read(self, param: Param) -> Tensor:
        """The value of a parameter, in its expression's dtype; a meta tensor in a planned run."""
        return self.value(param.expr)

    def value(self, expr: Expr) -> Tensor:
        """The value of an expression; a meta tensor in a planned run."""
        self.read_weights = True
        if self.planned:
            return torch.empty(expr.shape, dtype=expr.dtype, device="meta")
        from compiler.weights.evaluate import evaluate

        return evaluate([expr], self._graph.sources)[0]

    @property
    def has_calibration(self) -> bool:
        """Whether the run, planned or not, is given calibration data."""
        return self._calibration is not no_calibration

    def calibration(self) -> Sequence[Mapping[str, Tensor]]:
        """Batches of the model's inputs by name; none in a planned run.

        Raises PassError when the run has no calibration data or its tokens have other numbers by now, DataError when
        the data does not fit the model.
        """
        if self._graph.tokens is not None:
            cause = "a pass before it has taken tokens out, which calibration data may hold"
            raise PassError(cause, remedy="take tokens out after all passes that calibrate")
        self.read_weights = True
        return [] if self.planned else self._calibration(self._graph)

    def spill(self, name: str, tensor: Tensor) -> Expr:
        """Keep a computed tensor in the work directory and return the expression that reads it back."""
        key = self._spill.add(name, tensor)
        return load("spill", key, self._spill.types[key])

    def scratch(self) -> AbstractContextManager[None]:
        """A place in which what is spilled is forgotten at the end: expressions that read it may not be kept."""
        return self._spill.temporary()

    def _option_holding(self, where: Selector) -> str:
        held = (f.name for f in dataclasses.fields(self._step) if getattr(self._step, f.name) is where)
        return next(held, "where")


def _selector_text(where: Selector) -> str:
    if isinstance(where, str):
        return where
    if isinstance(where, Mapping):
        return ", ".join(f"{name}: {value}" for name, value in where.items())
    return ", ".join(where)


class Pipeline:
    """Passes in order. Raises OrderError when they cannot stand in this order."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = tuple(passes)
        for late, early, reason in order_conflicts(self.passes):
            raise OrderError(reason, where=f"pass {late + 1}", remedy=order_remedy(self.passes, late, early))

    def run(
        self,
        graph: Graph,
        *,
        observers: Sequence[Observer] = (),
        workdir: Path | None = None,
        planned: bool = False,
        bytes_of: Bytes | None = None,
        calibration: Calibration = no_calibration,
    ) -> Report:
        """Run every pass on ``graph``, in place. Spilled tensors go to ``workdir`` (to memory without one).
        ``calibration`` makes batches of a graph's inputs, by name; it is asked when a pass wants them.

        A planned run reads no weight. ``bytes_of`` says how many bytes a parameter takes in the format to be written.
        Raises what passes raise, and VerifyError when one breaks the graph.
        """
        spill = SpillSource(workdir / "spill" if workdir else None)
        graph.sources["spill"] = spill
        original = copy_of(graph) if any(step.compares for step in self.passes) else graph
        report = Report(measure(graph, bytes_of), bytes_by_layer(graph, bytes_of))
        report.matrices_before = matrices(graph, bytes_of)
        for index, step in enumerate(self.passes):
            ledger = report.after
            entry = PassReport(step.key(), step.options(), step.exact, ledger, ledger)
            progress = Progress(workdir / f"progress-{index}" if workdir else None)
            ctx = Context(graph, original, step, entry, spill, progress, planned, calibration)
            self._run_one(index, graph, ctx, observers)
            entry.after = measure(graph, bytes_of)
            report.passes.append(entry)
            report.read_weights |= ctx.read_weights
            for observer in observers:
                observer.after(index, step, graph, entry)
        report.layers_after, report.matrices_after = bytes_by_layer(graph, bytes_of), matrices(graph, bytes_of)
        return report

    def _run_one(self, index: int, graph: Graph, ctx: Context, observers: Sequence[Observer]) -> None:
        step = self.passes[index]
        for observer in observers:
            observer.before(index, step, graph)
        try:
            expected, tokens = signature(graph), graph.tokens
            step.run(graph, ctx)
            verify(graph, expected if graph.tokens is tokens else None)  # without tokens logits are fewer
        except CompressError as error:
            for observer in observers:
                observer.failed(index, step, graph, error)
            if error.span is None:
                error.where = f"pass {index + 1}, {step.key()}" + (f", at {error.where}" if error.where else "")
            raise


def order_conflicts(passes: Sequence[Pass]) -> list[tuple[int, int, str]]:
    """(late index, early index, reason) for every pass that cannot follow an earlier one."""
    conflicts: list[tuple[int, int, str]] = []
    for late, step in enumerate(passes):
        early = next((i for i, earlier in enumerate(passes[:late]) if earlier.quantises), None)
        if step.edits_weights and early is not None:
            reason = f"`{step.key()}` edits dense weights, but `{passes[early].key()}` before it has quantised them"
            conflicts.append((late, early, reason))
    return conflicts


def order_remedy(passes: Sequence[Pass], late: int, early: int) -> str:
    """What to do about an order conflict."""
    return f"put `{passes[late].key()}` before `{passes[early].key()}`"
