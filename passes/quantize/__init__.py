"""Round weights to integers of a few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from compiler.ir.graph import Graph, Param
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass
from compiler.weights.expr import Expr
from compiler.weights.ops.quant import quantise
from passes.quantize.places import check_groups, chosen_of


@dataclass(frozen=True)
class Quantize(Pass):
    """Round every selected weight to the nearest of 2^bits evenly spaced values a group.

    w ~ (q - z) * s with q = clamp(round(w / s + z), -2^(bits-1), 2^(bits-1) - 1). A group is ``group`` consecutive
    inputs of one output row (0: the whole row) and has its own scale s, kept in the weight's storage dtype;
    symmetric codes have z = 0, asymmetric ones an integer zero point a group. No calibration data is needed.

    ``scale: minmax`` takes the smallest scale that clips nothing; ``search`` takes, group by group, the one of least
    squared error among ten or so candidates, which clip up to 60 % of the range. More bits never give a larger error.
    ``tied: copy`` also quantises a head that shares its tensor with the embedding: the embedding stays dense
    and the head gets its own quantised copy; by default such a weight is left alone.

    Never exact. Round to nearest is the baseline that every method of quantisation is measured against.
    """

    where: Selector = "linear"
    skip: tuple[str, ...] = ()
    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    group: int = 0
    symmetric: bool = True
    scale: Literal["search", "minmax"] = "search"
    tied: Literal["skip", "copy"] = "skip"

    exact_when: ClassVar = None
    edits_weights: ClassVar[bool] = False
    quantises: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when the group divides no selected input width, or nothing can be quantised."""
        chosen = chosen_of(graph, ctx, ctx.select(self.where, skip=self.skip), self.tied)
        check_groups(chosen, self.group)
        for param in chosen:
            dense = param.expr
            param.expr = self._quantised(param)
            ctx.rewrote(param.name, self._scheme(), bytes_before=dense.type.with_dtype(param.storage).nbytes)

    def _quantised(self, param: Param) -> Expr:
        return quantise(
            param.expr,
            self.bits,
            self.group,
            symmetric=self.symmetric,
            search=self.scale == "search",
            scale_dtype=param.storage,
        )

    def _scheme(self) -> str:
        per = f"groups of {self.group}" if self.group else "one scale a row"
        return f"int{self.bits}, {'symmetric' if self.symmetric else 'asymmetric'}, {per}"
