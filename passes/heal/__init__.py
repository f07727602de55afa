"""Healing: train what passes have rewritten to do again what the original did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compiler.errors import PassError
from compiler.ir.graph import Graph, Param
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass

Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, lt=1)]


@dataclass(frozen=True)
class Heal(Pass):
    """Train what the passes before have changed, so that the model does again what the original did.

    First layer by layer: each layer's changed matrices are fitted, by Adam on ``layer-tokens`` tokens, to the outputs
    that the original's layer has in the original. Then end to end: low-rank ``adapters`` of those matrices learn the
    original's outputs (Kullback-Leibler divergence of logits, relative squared error of others) on ``tokens`` tokens
    and are folded into the weights. 0 leaves a stage out. Calibration data only; no labels.

    ``where`` chooses the matrices; by default those that the passes before changed, or every projection of attention
    if they changed none. A step moves a number by about ``layer-rate``, and end to end by ``rate``, of the
    root mean square of its row.

    ``of: means`` compares, end to end, the mean over all tokens of each sample instead of every token's vector: what an
    encoder of sentences is used for.

    Some windows are not trained on. A stage whose result is no nearer to the original on them is undone. An
    interrupted run, repeated, goes on and ends in the same bytes.
    """

    where: Selector | None = None
    layer_tokens: Count = 32768
    tokens: Count = 196608
    adapters: Annotated[int, Field(ge=1)] = 16
    layer_rate: Rate = 5e-3
    rate: Rate = 1e-3
    of: Literal["tokens", "means"] = "tokens"
    seed: Count = 0

    exact_when: ClassVar = None
    compares: ClassVar[bool] = True

    @property
    def calibrated(self) -> bool:
        return True

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when there is nothing to train, or too little to train on."""
        params = self._params(graph, ctx)
        batches = ctx.calibration()
        if ctx.planned:
            for param in params:
                ctx.rewrote(param.name, "to be trained")
            return
        from passes.heal.stages import heal

        heal(self, graph, ctx, params, batches)

    def _params(self, graph: Graph, ctx: Context) -> list[Param]:
        selected = _changed(graph, ctx.original) if self.where is None else ctx.select(self.where)
        matrices = [param for param in selected if param.type.rank > 1 and param.storage.is_floating_point]
        if not matrices and self.where is None:
            return ctx.select("attention")
        for param in selected:
            if param not in matrices:
                ctx.skipped(param.name, f"is no matrix of floats but {param.type}")
        if not matrices:
            raise PassError("`where` selects no matrix", option="where", remedy="`where: linear` selects all of them")
        return matrices


def _changed(graph: Graph, original: Graph) -> list[Param]:
    """The weights that are not in ``original``, or have another value there, in order of first use."""
    read = dict.fromkeys(value for node in graph.nodes for value in node.inputs if isinstance(value, Param))
    before = {name: param.expr for name, param in original.params.items()}
    return [param for param in read if param.persistent and before.get(param.name) != param.expr]
