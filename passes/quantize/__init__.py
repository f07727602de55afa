"""Round weights to integers, or to floats, of a few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compiler.errors import PassError
from compiler.ir.graph import Graph, Param
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass
from passes.quantize.activations import Activations, round_cache, round_inputs
from passes.quantize.numbers import ROBUST, SQUARES, NumberSystem, Per, Type, Width, Zeros
from passes.quantize.places import (
    DAMPING,
    STEPS,
    check_damping,
    check_experts,
    check_groups,
    check_learnable,
    check_searchable,
    check_widths,
    chosen_of,
    report,
)


@dataclass(frozen=True)
class Quantize(Pass):
    """Round every selected weight to the nearest of the numbers that a few bits and a shared scale can say.

    ``type: int`` has 2^bits evenly spaced values a group; the other types, whose bits and groups are fixed, are below.

    w ~ (q - z) * s with q = clamp(round(w / s + z), -2^(bits-1), 2^(bits-1) - 1). A group is ``group`` consecutive
    inputs of one output row (0: the whole row) and has its own scale s, kept in the weight's storage dtype;
    symmetric codes have z = 0, asymmetric ones an integer zero point a group.

    ``zeros: real`` lets z be any number, as half-quadratic quantisation does; only generated modules hold that.

    ``group: search`` takes for each matrix, or those that read the same, the size of groups that is worth its scales:
    the least squared error times 4 to the power of the bits a weight that these take.

    ``scale: minmax`` takes the smallest scale that clips nothing; ``search`` takes, group by group, the one of least
    squared error among ten or so candidates, which clip up to 60 % of the range. More bits never give a larger error.
    ``robust`` (int) goes by the sum of |error|^0.7 instead, as half-quadratic quantisation does: outliers may err.
    ``weighted`` searches as ``search`` does, each squared error times the energy of the input that it multiplies, on
    inputs that have passed the weights quantised before.
    ``type: fp8`` is e4m3 with a scale for each row, for blocks of 128 x 128 or for the matrix (``per``); in ``mxfp4``,
    ``mxfp6-e2m3``, ``mxfp6-e3m2`` and ``mxfp8`` 32 inputs share a power of two, in ``nvfp4`` 16 share an e4m3 scale.
    ``ternary`` has the codes -1, 0 and 1 and a scale a group, stored as integers of two bits. ``q4_0`` to ``q8_0``,
    ``q2_k`` to ``q6_k`` and the ternary ``tq1_0`` and ``tq2_0`` are the block formats of GGUF files, for
    ``emit: [gguf]``.

    ``method: nearest`` rounds every element by itself and needs no data. `gptq` (arXiv 2210.17323) rounds column by
    column, on inputs that have passed the weights quantised before, and lets the columns to come make up for each
    error. `refined` aims at what the original computes, weighs every input by how much the loss depends on what the
    product makes of it, and then improves scales and codes in turns; it takes more than twice as long.

    ``damping`` is added to the energy of every input that columns make up for one another by, as a part of the mean
    energy: `search` tries five for each matrix and takes that of least error on windows that it was not solved on.

    ``learn`` then goes through the layers and fits integer codes and scales to what each of the original's gives, in
    ``steps`` steps of 512 tokens: `rounding` by signs of gradients, up or down (AutoRound, arXiv 2309.05516),
    `scaling` by what weights are divided by before, of low rank (LRQ, arXiv 2407.11534). A layer keeps what it learned
    where held-out windows agree that it is nearer.

    A fractional number of ``bits`` is an average: each matrix gets one of ``widths`` (2, 3, 4, 5, 6, 8 unless given),
    so that what rounding is predicted to cost the model is least, unless the two widths around the average, spread over
    the model, are measured to be nearer to the original on windows held out. With ``widths`` so does a whole number,
    unless one width for all is nearer. Matrices that read the same input get the same. ``experts: apart`` lets those of
    one stack differ, by how often each is chosen and what rounding it costs; a generated module holds them.

    ``tied: copy`` also quantises a head that shares its tensor with the embedding: the embedding stays dense
    and the head gets its own quantised copy; `share` quantises the one tensor for both; by default such a weight is
    left alone.

    ``activations: int8`` or `fp8` also rounds what quantised linear maps multiply, as runtimes with products of such
    numbers do: with a scale for each token, or, ``activation-scale: static``, one for all that clips nothing that
    calibration shows. ``cache`` rounds the keys and values of causal attention, with static scales.

    Never exact.
    """

    where: Selector = "linear"
    skip: tuple[str, ...] = ()
    type: Type = "int"
    bits: Width | Annotated[float, Field(gt=2, lt=8)] = 8
    widths: tuple[Width, ...] = ()
    experts: Literal["alike", "apart"] = "alike"
    group: int | Literal["search"] = 0
    symmetric: bool = True
    zeros: Zeros = "integer"
    per: Per = "row"
    scale: Literal["search", "minmax", "weighted", "robust"] = "search"
    method: Literal["nearest", "gptq", "refined"] = "nearest"
    damping: Annotated[float, Field(gt=0, lt=1)] | Literal["search"] = DAMPING
    learn: Literal["none", "rounding", "scaling"] = "none"
    steps: Annotated[int, Field(ge=1)] = STEPS
    tied: Literal["skip", "copy", "share"] = "skip"
    activations: Activations = "none"
    activation_scale: Literal["token", "static"] = "token"
    cache: Activations = "none"

    exact_when: ClassVar = None
    edits_weights: ClassVar[bool] = False
    quantises: ClassVar[bool] = True

    @property
    def mixed(self) -> bool:
        """Whether weights may differ in how many bits they get."""
        return bool(self.widths) or self.bits != int(self.bits)

    @property
    def solved(self) -> bool:
        """Whether codes are chosen by what they do to calibration data."""
        return self.by_inputs or self.mixed or self.learn != "none"

    @property
    def by_inputs(self) -> bool:
        """Whether codes, or at least scales, are chosen by what matrices multiply."""
        return self.method != "nearest" or self.scale == "weighted"

    @property
    def calibrated(self) -> bool:
        return self.solved or self.activation_scale == "static" or self.cache != "none"

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when the group divides no selected input width, or nothing can be quantised."""
        if self.mixed:
            check_widths(self.bits, self.widths, self.type)
        system = self.system(int(self.bits))
        system.check()
        check_damping(self.damping, solved=self.method != "nearest")
        check_experts(self.experts, self.type, self.learn, self.zeros, mixed=self.mixed)
        check_learnable(self.learn, self.type, self.zeros, self.steps)
        if self.activation_scale == "static" and self.activations == "none":
            raise PassError("no activations are rounded", option="activation-scale", remedy="say `activations: int8`")
        chosen = chosen_of(graph, ctx, ctx.select(self.where, skip=self.skip), self.tied)
        if self.group == "search":
            check_searchable(self.type, solved=self.solved)
        else:
            check_groups(chosen, system.fixed_group or self.group, self.type if system.fixed_group else "")
        if self.solved:
            from passes.quantize.reduce import reduce

            reduce(graph, ctx, self, chosen)
        else:
            self._round(graph, ctx, chosen)
        if self.activations != "none":
            round_inputs(graph, ctx, chosen, self.activations, static=self.activation_scale == "static")
        if self.cache != "none":
            round_cache(graph, ctx, self.cache)

    def _round(self, graph: Graph, ctx: Context, chosen: Sequence[Param]) -> None:
        """Every weight to nearest, without reading any but to find groups."""
        codecs = self.system(int(self.bits)).codecs(chosen)
        if self.group == "search":
            from passes.quantize.granularity import searched

            sizes = searched(graph, ctx, self, chosen)
            codecs = {param: self.system(int(self.bits), size).codec(param.storage) for param, size in sizes.items()}
        for param, codec in codecs.items():
            report(ctx, param, str(self.system(codec.bits, codec.group)))
            param.expr = codec.nearest(param.expr)

    def system(self, bits: int, group: int | None = None) -> NumberSystem:
        """The number system of weights of so many bits, in groups of ``group`` or, if None, of the pass's."""
        power = ROBUST if self.scale == "robust" else SQUARES
        if group is None:
            group = 0 if self.group == "search" else self.group
        return NumberSystem(self.type, bits, group, self.symmetric, self.per, self.scale != "minmax", power, self.zeros)
