"""Quantise weights by what enters them: in the order of computation, each on what those before it have become."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.calibration.energies import Energies, energies
from compiler.calibration.fidelity import Fidelity, spread
from compiler.calibration.moments import Moments
from compiler.calibration.products import matrix_shape, products
from compiler.calibration.sequence import Batches, Met, in_order
from compiler.ir.graph import Graph, Param
from compiler.ir.layers import copy_of
from compiler.pipeline import Context
from compiler.weights.expr import Expr
from compiler.weights.ops.codec import Codec
from compiler.weights.ops.integer import Integer
from passes.quantize.blocks import learn_blocks
from passes.quantize.experts import AnyCodec, Bits, Experts, Widths, bits_of, matrices, of_expert
from passes.quantize.mixed import EVEN, Data, allotments, evenly, predicted, together, whole
from passes.quantize.numbers import TABLE_BITS, TABLES
from passes.quantize.places import DAMPING, report
from passes.quantize.resume import Numbers, Solved
from passes.quantize.solve import Problem, Solution, chosen_damping, damped, nearest, solve

if TYPE_CHECKING:
    from passes.quantize import Quantize

TOKENS = 32768  # of calibration data that weights are quantised on
REFINED_TOKENS = 16384  # with energies, for which data is run forward and back, fewer do
CHOICE_TOKENS = 2048
TRIAL_TOKENS = 8192  # of calibration data that ways to share out bits are compared by
WIDTHS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Quantised:
    """A weight's expression, and what the report says of it: its error over its own size, both as outputs show them."""

    expr: Expr
    numbers: Numbers = field(default_factory=dict[str, float])


def reduce(graph: Graph, ctx: Context, wanted: Quantize, params: Sequence[Param]) -> None:
    """Quantise ``params`` of ``graph`` as ``wanted`` says."""
    job = _Job(graph, ctx, wanted, params)
    bits, made = job.planned() if ctx.planned else job.nearest_to_original()
    if wanted.learn != "none" and not ctx.planned:
        learned = learn_blocks(graph, ctx, wanted, {param: one.expr for param, one in made.items()})
        made = {**made, **{param: Quantised(expr) for param, expr in learned.items()}}
    for param in params:
        how = _described(wanted, bits[param]) + (
            "" if param in job.measurable else "; to nearest, for it is no product"
        )
        report(ctx, param, how, **made[param].numbers)
        param.expr = made[param].expr


def _described(wanted: Quantize, bits: Widths) -> str:
    """How a weight is quantised, for the report."""
    if isinstance(bits, int):
        return str(wanted.system(bits))
    counts = ", ".join(f"{bits.count(width)} of {width} bits" for width in sorted({*bits}))
    return f"{str(wanted.system(bits[0])).replace(f'int{bits[0]}', 'int', 1)}, experts apart: {counts}"


class _Job:
    """What it takes to quantise weights on a copy of the graph."""

    def __init__(
        self, graph: Graph, ctx: Context, wanted: Quantize, params: Sequence[Param], batches: Batches | None = None
    ) -> None:
        self.graph = graph
        self.ctx = ctx
        self.wanted = wanted
        self.params = params
        known = products(graph)
        self.measurable = [param for param in params if param in known and len(known[param]) == len(param.users)]
        self.widths = sorted(set(wanted.widths or (TABLE_BITS if wanted.type in TABLES else WIDTHS)))
        self._batches = ctx.calibration() if batches is None else batches
        self._energies: Energies | None = None

    def planned(self) -> tuple[Bits, dict[Param, Quantised]]:
        """Expressions of the right types and, as far as can be known before measuring, sizes."""
        bits, others = self._uniform(), [width for width in self.widths if width != self.wanted.bits]
        if self.wanted.mixed and others and others[0] < self.wanted.bits < others[-1]:
            apart = self.wanted.experts == "apart"
            groups = [own for g in together(self.graph, self.params) for own in matrices(g, apart=apart)]
            bits = bits_of(evenly(groups, self.wanted.bits, others))
        return bits, {param: Quantised(self._planned(param, codec)) for param, codec in self._codecs(bits).items()}

    def _planned(self, param: Param, codec: AnyCodec) -> Expr:
        """Codes and parameters without values; of rounding to nearest the expression itself."""
        expr = codec.nearest(param.expr)
        if not self.wanted.by_inputs or param not in self.measurable:
            return expr
        parts = [torch.empty(part.shape, dtype=part.dtype, device="meta") for part in expr.args]
        return codec.expression([self._kept(param, index, part) for index, part in enumerate(parts)])

    def _kept(self, param: Param, index: int, part: Tensor) -> Expr:
        return self.ctx.spill(f"{param.name}.part{index}", part)

    def nearest_to_original(self) -> tuple[Bits, dict[Param, Quantised]]:
        """What the options allow that brings the model nearest to the original."""
        bits = self._shared_out() if self.wanted.mixed else self._uniform()
        return bits, self.made(bits)

    def _shared_out(self) -> Bits:
        """Widths by predicted loss, or without it where held-out batches are nearer to the original so.

        Weights that are not measured get the widest that is no wider than the average.
        """
        data, bits, solved = Data.of(self._batches), self.wanted.bits, self.wanted.method != "nearest"
        losses = predicted(
            self.graph,
            self.ctx,
            self.measurable,
            data,
            self.widths,
            self._codec,
            solved=solved,
        )
        apart = self.wanted.experts == "apart"
        plain: dict[Param, Widths] = dict.fromkeys(self.params, max(width for width in self.widths if width <= bits))
        ways: list[tuple[str, Bits]] = [
            (what, {**plain, **own}) for what, own in allotments(losses, bits, self.widths, apart=apart).items()
        ]
        if bits in self.widths:
            ways.append((EVEN, self._uniform()))
        elif not ways:
            ways.append((EVEN, plain))
        found = dict({tuple(own.values()): (what, own) for what, own in ways}.values())  # each once
        best = self._nearest(found, data) if len(found) > 1 else next(iter(found))
        for group, own in (losses if apart else whole(losses)).items():
            kept = [width / self.widths[-1] for width in self.widths]
            self.ctx.weighed(", ".join(map(str, group)), kept, own, group[0].bits(found[best]) / self.widths[-1])
        return found[best]

    def _nearest(self, ways: Mapping[str, Bits], data: Data) -> str:
        """That of ``ways`` by which the model is nearest on what is held out, solved on the rest and not refined."""
        fidelity = Fidelity(self.graph, spread(data.held, CHOICE_TOKENS))
        quick = replace(self.wanted, method="gptq") if self.wanted.method == "refined" else self.wanted
        job = _Job(self.graph, self.ctx, quick, self.params, spread(data.rest, TRIAL_TOKENS))
        distances = {what: job.trial(bits, fidelity) for what, bits in ways.items()}
        best = min(distances, key=lambda what: distances[what])
        for what, distance in distances.items():
            self.ctx.tried(what, distance, what == best)
        return best

    def trial(self, bits: Bits, fidelity: Fidelity) -> float:
        """How far the model is from the original with so many bits. Nothing else of it is kept."""
        solved = Solved(self.ctx.progress, self.graph, self.wanted, bits, self._used())
        distance = solved.distance()
        if distance is None:
            with self.ctx.scratch():
                distance = fidelity.distance(self._with(self.made(bits)))
            solved.end_trial(self.params, distance)
        return distance

    def _used(self) -> Batches:
        """The calibration batches that weights are solved on."""
        return spread(self._batches, REFINED_TOKENS if self.wanted.method == "refined" else TOKENS)

    def made(self, bits: Bits) -> dict[Param, Quantised]:
        """Every weight with so many bits. The graph is left as it is."""
        codecs = self._codecs(bits)
        trial = copy_of(self.graph)
        ordered = self.measurable if self.wanted.by_inputs else []
        made = {param: Quantised(codecs[param].nearest(param.expr)) for param in self.params if param not in ordered}
        for param, one in made.items():
            trial.params[param.name].expr = one.expr
        refine = self.wanted.method == "refined"
        batches = self._used()
        solved = Solved(self.ctx.progress, self.graph, self.wanted, bits, batches)
        for group in together(self.graph, ordered):
            for param, (parts, numbers) in solved.load(group).items():
                made[param] = self._quantised(param, codecs[param], parts, numbers)
                trial.params[param.name].expr = made[param].expr
        left = [param for param in ordered if param not in made]
        counts = self._measured_energies(batches) if refine and left else None
        how = {"paired": refine, "held": self.wanted.damping == "search"}
        for met in in_order(self.graph, trial, left, batches, energies=counts, **how) if left else ():
            for param, (parts, numbers) in self._solved(met, codecs).items():
                solved.save(param, parts, numbers)
                made[param] = self._quantised(param, codecs[param], parts, numbers)
                trial.params[param.name].expr = made[param].expr
        return made

    def _quantised(self, param: Param, codec: AnyCodec, parts: Sequence[Tensor], numbers: Numbers) -> Quantised:
        kept = [self._kept(param, index, part) for index, part in enumerate(parts)]
        return Quantised(codec.expression(kept), numbers)

    def _solved(self, met: Met, codecs: Mapping[Param, AnyCodec]) -> dict[Param, tuple[list[Tensor], Numbers]]:
        """For each weight of ``met`` what to keep and what to report. Rows of one codec are solved as one matrix."""
        own = {param: codecs[param].reading(self.ctx.value) for param in met.params}
        first = own[met.params[0]]
        joined = first.by_rows and all(codec == first for codec in own.values())
        found: dict[Param, tuple[list[Tensor], Numbers]] = {}
        for params in (met.params,) if joined else tuple((param,) for param in met.params):
            found.update(self._together(params, own[params[0]], met))
        return found

    def _together(
        self, params: Sequence[Param], codecs: AnyCodec, met: Met
    ) -> Iterator[tuple[Param, tuple[list[Tensor], Numbers]]]:
        shapes = [matrix_shape(param) for param in params]
        experts, _, columns = shapes[0]
        rows = [shape[1] for shape in shapes]
        matrices = torch.cat([self.ctx.read(param).float().reshape(experts, -1, columns) for param in params], 1)
        stored: list[list[tuple[Tensor, ...]]] = []
        costs: list[Tensor] = []
        dampings: list[float] = []
        for expert, matrix in enumerate(matrices):
            codec = of_expert(codecs, expert)
            wanted = matrix if met.fit is None else (matrix.double() @ met.fit).float()
            dampings.append(self._damping(wanted, met, codec, expert))
            problem = Problem(wanted, damped(_second(met.moments, expert), dampings[-1]))
            own = codec.for_matrix(matrix, problem.second.diagonal())
            solution = self._solution(problem, own)
            cut = zip(*(part.split(rows) for part in (solution.codes, *solution.parameters)), strict=True)
            stored.append([own.stored(part[0], part[1:]) for part in cut])
            costs.append(torch.stack([problem.costs(values) for values in (solution.values, torch.zeros_like(matrix))]))
        lost = torch.stack(costs).sum(0).split(rows, 1)
        searched = {"damping": sum(dampings) / experts} if self.wanted.damping == "search" else {}
        for param, each, (over, under) in zip(params, zip(*stored, strict=True), (c.sum(1) for c in lost), strict=True):
            parts = [torch.stack(part) if param.type.rank > 2 else part[0] for part in zip(*each, strict=True)]
            yield param, (parts, {"relative_error": float(over / under) if under else 0.0, **searched})

    def _damping(self, wanted: Tensor, met: Met, codec: Codec, expert: int) -> float:
        if self.wanted.damping != "search":
            return self.wanted.damping
        if met.parts is None:
            return DAMPING
        rest, held = (_second(moments, expert) for moments in met.parts)
        return chosen_damping(wanted, rest, held, codec)

    def _solution(self, problem: Problem, codec: Codec) -> Solution:
        if self.wanted.method == "nearest":
            return nearest(problem, codec, weighted=True)
        return solve(problem, codec, refine=self.wanted.method == "refined")

    def _measured_energies(self, batches: Sequence[Mapping[str, Tensor]]) -> Energies:
        if self._energies is None:
            known = products(self.graph)
            nodes = {param: known[param][0] for param in self.measurable if len(known[param]) == 1}
            self._energies = energies(self.graph, nodes, batches, self.ctx.progress)
        return self._energies

    def _uniform(self) -> Bits:
        return dict.fromkeys(self.params, int(self.wanted.bits))

    def _codecs(self, bits: Bits) -> Mapping[Param, AnyCodec]:
        alike, *others = set(bits.values())
        if not others and isinstance(alike, int):
            return self.wanted.system(alike).codecs(list(bits))
        return {
            param: self._codec(param, own) if isinstance(own, int) else self._of_experts(param, own)
            for param, own in bits.items()
        }

    def _codec(self, param: Param, width: int) -> Codec:
        return self.wanted.system(width).codec(param.storage)

    def _of_experts(self, param: Param, widths: Sequence[int]) -> Experts:
        each = (self._codec(param, width) for width in widths)
        return Experts(tuple(codec for codec in each if isinstance(codec, Integer)))

    def _with(self, made: Mapping[Param, Quantised]) -> Graph:
        trial = copy_of(self.graph)
        for param, one in made.items():
            trial.params[param.name].expr = one.expr
        return trial


def _second(moments: Moments, expert: int) -> Tensor:
    """The second moment of what an expert, or the only matrix, meets."""
    return moments.second if moments.second.ndim == 2 else moments.second[expert]
