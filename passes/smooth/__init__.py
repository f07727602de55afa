"""Scales of channels moved from what enters a matrix into the matrix, so that rounding it costs less."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from compiler.errors import PassError
from compiler.ir.graph import Graph
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Smooth(Pass):
    """Divide the channels that matrices read by numbers s, and multiply the matrices' columns by them.

    What makes the channels takes 1/s: a norm's scale and shift, rows of the linear map before it, through gates,
    heads and experts, as the graph allows. Exact: what is computed stays the same until weights are rounded.

    ``method`` says which s. `smoothquant` (arXiv 2211.10438): max|x|^a / max|w|^(1-a), a = ``alpha``. `awq` (arXiv
    2306.00978): mean|x|^a, a on a grid, of least error of the rounded matrices' outputs. `fit`: the minimum of the
    rounding error that is to be expected, which is convex in log s, where that has less error than awq; of all of
    these, awq and no scales, what brings the rounded model nearest to the original on calibration data is taken.
    The error is measured by second moments, for weights rounded as ``bits``, ``group`` and ``symmetric`` say;
    ``metric`` weighs outputs all alike (`input`), or by what their errors cost the `loss`.

    ``powers-of-two`` rounds s so that weights stored in few bits change exactly. ``insert`` puts a multiplication
    where nothing can take 1/s; the model's own class has no place for it.
    """

    where: Selector = "linear"
    skip: tuple[str, ...] = ()
    method: Literal["fit", "awq", "smoothquant"] = "fit"
    alpha: Share = 0.5
    bits: Literal[2, 3, 4, 5, 6, 7, 8] = 4
    group: int = 0
    symmetric: bool = True
    metric: Literal["input", "loss"] = "input"
    powers_of_two: bool = False
    insert: bool = False

    def __post_init__(self) -> None:
        if self.method != "smoothquant" and self.alpha != Smooth.alpha:
            cause = "`alpha` is read only by `method: smoothquant`"
            raise PassError(cause, option="alpha", remedy="leave `alpha` out, or write `method: smoothquant`")

    @property
    def calibrated(self) -> bool:
        return True

    @property
    def weighs(self) -> bool:
        """Whether outputs are weighed."""
        return self.metric == "loss" and self.method != "smoothquant"

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when nothing that is selected can be smoothed, or the group divides no input width."""
        from passes.smooth.reduce import smooth

        smooth(graph, ctx, self, ctx.select(self.where, skip=self.skip))
