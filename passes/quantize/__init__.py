"""Round weights to integers, or to floats, of a few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from compiler.ir.graph import Graph
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass
from passes.quantize.activations import Activations, round_inputs
from passes.quantize.numbers import NumberSystem, Per, Type
from passes.quantize.places import check_groups, chosen_of


@dataclass(frozen=True)
class Quantize(Pass):
    """Round every selected weight to the nearest of the numbers that a few bits and a shared scale can say.

    ``type: int`` has 2^bits evenly spaced values a group; the other types, whose bits and groups are fixed, are below.

    w ~ (q - z) * s with q = clamp(round(w / s + z), -2^(bits-1), 2^(bits-1) - 1). A group is ``group`` consecutive
    inputs of one output row (0: the whole row) and has its own scale s, kept in the weight's storage dtype;
    symmetric codes have z = 0, asymmetric ones an integer zero point a group. No calibration data is needed.

    ``scale: minmax`` takes the smallest scale that clips nothing; ``search`` takes, group by group, the one of least
    squared error among ten or so candidates, which clip up to 60 % of the range. More bits never give a larger error.
    ``type: fp8`` is e4m3 with a scale for each row, for blocks of 128 x 128 or for the matrix (``per``); in ``mxfp4``
    and ``mxfp8`` 32 inputs share a power of two, in ``nvfp4`` 16 share an e4m3 scale.

    ``tied: copy`` also quantises a head that shares its tensor with the embedding: the embedding stays dense
    and the head gets its own quantised copy; by default such a weight is left alone.

    ``activations: int8`` or `fp8` also rounds what quantised linear maps multiply, token by token, as runtimes with
    products of such numbers do.

    Never exact. Round to nearest is the baseline that every method of quantisation is measured against.
    """

    where: Selector = "linear"
    skip: tuple[str, ...] = ()
    type: Type = "int"
    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 8
    group: int = 0
    symmetric: bool = True
    per: Per = "row"
    scale: Literal["search", "minmax"] = "search"
    tied: Literal["skip", "copy"] = "skip"
    activations: Activations = "none"

    exact_when: ClassVar = None
    edits_weights: ClassVar[bool] = False
    quantises: ClassVar[bool] = True

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when the group divides no selected input width, or nothing can be quantised."""
        system = self._system()
        system.check()
        chosen = chosen_of(graph, ctx, ctx.select(self.where, skip=self.skip), self.tied)
        check_groups(chosen, system.fixed_group or self.group, self.type if system.fixed_group else "")
        for param, codec in system.codecs(chosen).items():
            dense = param.expr
            param.expr = codec.nearest(dense)
            ctx.rewrote(param.name, str(system), bytes_before=dense.type.with_dtype(param.storage).nbytes)
        if self.activations != "none":
            round_inputs(graph, ctx, chosen, self.activations)

    def _system(self) -> NumberSystem:
        return NumberSystem(self.type, self.bits, self.group, self.symmetric, self.per, self.scale == "search")
