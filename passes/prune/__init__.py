"""Structured pruning: smaller dense models, from the coupling groups of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compiler.ir.graph import Graph
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass
from passes.prune.conflicts import DEPTH, check

Part = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=2)]
Runtime = Literal["onnxruntime", "torch"]
Kind = Literal["channels", "groups", "heads", "experts", "layers", "sublayers", "hidden", "vocabulary"]


@dataclass(frozen=True)
class Prune(Pass):
    """Remove whole dimensions of the model, so that ``keep`` of the parameters that ``where`` selects remain.

    ``what``, one or several: `channels` (inside of MLPs, experts and convolutions), `groups` (key/value heads with
    their query heads: the cache shrinks too), `heads` (query heads, as many in each group), `experts` (with the
    router's rows), `hidden` (the residual stream), `layers` and `sublayers` (attention or an MLP alone), `vocabulary`
    (tokens that calibration data hardly holds, in the tokenizer too). ``keep`` may also be the number that remains of
    each place (1152 channels), and is a part of the whole model with ``of: model``.
    Channels and widths remain in multiples of ``align``.

    ``faster: 1.5`` in place of ``keep`` prunes until the model takes 1 / 1.5 of its time, by a table of what its
    operations take on the shapes in question. The table is measured here in ``runtime`` with ``batch`` samples of
    ``tokens`` tokens (1 is decoding) on ``threads`` threads, and written beside the report; ``latency`` names one that
    was measured elsewhere, or before.

    ``score`` says what goes first. `loss`: what removal costs the model in nats, 1/2 tr(M E C E^T) with the second
    moments C of what enters and M of the loss's gradient at what leaves the projection that reads the dimension, whose
    other columns make up for the loss as well as they can (optimal brain surgeon). `magnitude`: norms of weights.
    `activation`: norms of weights times those of inputs (Wanda). `fluctuation`: variances of inputs (FLAP). `taylor`:
    what the loss of a sample changes by, to first order (Molchanov, LLM-Pruner). `output`: the distance of the model
    without an index from the original (LD-Pruner), for heads, groups and experts. Layers go by the same, or, with
    `influence`, by how far they turn the stream (ShortGPT).

    ``rotate`` first turns the residual stream to its principal components (SliceGPT), so that of `hidden` what carries
    least goes, and the class stays: no norm has a scale then, and a head does not share the embedding's table.

    ``sizes: by-layer`` shares the parameters out by predicted cost where that is measured to be better; no stock class
    holds sizes that differ between layers. ``refit`` then fits each reading projection to what the original model
    computes, by least squares in the order of computation. Nothing is trained.

    Exact with ``keep: 100%`` and ``faster: 1``. What cannot be pruned is reported with the reason.
    """

    what: Kind | tuple[Kind, ...] = "channels"
    where: Selector = ("attention", "mlp", "experts", "conv")
    skip: tuple[str, ...] = ()
    keep: Part | Count = 1.0
    of: Literal["selected", "model"] = "selected"
    faster: Annotated[float, Field(ge=1)] = 1.0
    runtime: Runtime = "onnxruntime"
    batch: Annotated[int, Field(ge=1)] = 1
    tokens: Annotated[int, Field(ge=1)] = 128
    threads: Annotated[int, Field(ge=1)] = 1
    latency: Path | None = None
    align: Annotated[int, Field(ge=1)] = 64
    score: Literal["loss", "magnitude", "activation", "fluctuation", "taylor", "output", "influence"] = "loss"
    sizes: Literal["uniform", "by-layer"] = "uniform"
    refit: bool = False
    rotate: bool = False

    exact_when: ClassVar = {"keep": 1.0, "faster": 1.0}

    def __post_init__(self) -> None:
        check(self)

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.what,) if isinstance(self.what, str) else tuple(dict.fromkeys(self.what))

    @property
    def calibrated(self) -> bool:
        measured = self.score != "magnitude" or self.refit or self.rotate
        return not self.exact and (measured or bool((DEPTH | {"vocabulary"}) & set(self.kinds)))

    @property
    def packages(self) -> tuple[str, ...]:
        measures = self.faster > 1 and self.latency is None and self.runtime == "onnxruntime"
        return ("onnx", "onnxruntime") if measures else ()

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when nothing of the kinds asked for can be pruned, or so little cannot be kept."""
        params = ctx.select(self.where, skip=self.skip)
        if self.exact:
            return
        from passes.prune.reduce import reduce
        from passes.prune.vocabulary import shorten

        if "vocabulary" in self.kinds:
            shorten(graph, ctx, self)
        else:
            reduce(graph, ctx, self, params)
