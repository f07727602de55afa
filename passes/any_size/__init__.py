"""Weights that a loader reads as far as memory allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compiler.ir.graph import Graph
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass

Metric = Literal["loss", "input", "plain"]


@dataclass(frozen=True)
class AnySize(Pass):
    """Make every selected weight a sum of blocks of about one bit a number, any first few of which are a weight too.

    A block is a sign for each element and a product U V of ``rank`` that says how large it is; each fits what those
    before it have left (BitStack, arXiv 2410.23918). The checkpoint holds ``blocks`` of each weight, those of the whole
    model in the order of what they save per byte, and its code reads as many as the memory holds that it is given:
    ``AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, memory="30%")``. A block more is never worse.

    ``metric``: `loss` counts an error by what it costs the model on calibration data, `input` by what it changes in the
    product; signs then also make up for the errors of columns before. `plain` counts all elements alike, without data.
    ``tied: share`` also takes a table of tokens that is the head as well, as the head sees it.

    Never exact.
    """

    where: Selector = "linear"
    skip: tuple[str, ...] = ()
    blocks: Annotated[int, Field(ge=1, le=16)] = 6
    rank: Annotated[int, Field(ge=1)] = 2
    metric: Metric = "loss"
    tied: Literal["skip", "share"] = "skip"

    exact_when: ClassVar = None
    edits_weights: ClassVar[bool] = True
    quantises: ClassVar[bool] = True

    @property
    def calibrated(self) -> bool:
        return self.metric != "plain"

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when none of the selected weights can be made of blocks."""
        from passes.any_size.reduce import reduce

        reduce(graph, ctx, self, ctx.select(self.where, skip=self.skip))
