"""Weights most of whose elements are zero, one by one or some of each few."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compiler.errors import PassError
from compiler.ir.graph import Graph
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass
from passes.sparsify.places import Pattern

Part = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Sparsify(Pass):
    """Set elements of weights to zero, so that ``keep`` of them remain, or N of each M consecutive inputs.

    ``pattern: "2:4"`` (any N:M) takes the place of ``keep``. ``method`` says which remain. `sparsegpt` (arXiv
    2301.00774): those whose loss the rest of the row can least make up for, which it then does, fitted once more by
    conjugate gradients. `wanda` (arXiv 2306.11695): the largest |w| times the norm of its input in each row, as they
    are. `magnitude`: the largest |w|, without calibration.

    Weights are taken in the order of computation, on inputs that have passed the sparse ones before them. ``metric``
    weighs the outputs of a matrix with `sparsegpt`: `loss` by what errors of each cost the model's loss, `input` alike.
    ``sizes: by-layer`` shares the elements out by predicted cost where that is measured to be nearer to the original.

    The graph computes with dense weights that hold zeros; `emit` says how they are stored. Nothing is trained.
    Exact with ``keep: 100%`` and without a pattern.
    """

    where: Selector = ("attention", "mlp", "experts", "conv")
    skip: tuple[str, ...] = ()
    keep: Part = 1.0
    pattern: str | None = None
    method: Literal["sparsegpt", "wanda", "magnitude"] = "sparsegpt"
    metric: Literal["loss", "input"] = "loss"
    sizes: Literal["uniform", "by-layer"] = "uniform"

    exact_when: ClassVar = {"keep": 1.0, "pattern": None}

    def __post_init__(self) -> None:
        if self.pattern is not None and self.parsed is None:
            raise PassError(
                f"`{self.pattern}` is no pattern of N of each M inputs",
                option="pattern",
                remedy='write a pattern such as `pattern: "2:4"`, with N less than M',
            )
        if self.pattern is not None and (self.keep < 1 or self.sizes == "by-layer"):
            raise PassError(
                "a pattern says what remains of every matrix",
                option="pattern",
                remedy="leave out `keep` and `sizes`, or the pattern",
            )

    @property
    def parsed(self) -> Pattern | None:
        found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", self.pattern or "")
        return Pattern(int(found[1]), int(found[2])) if found and int(found[1]) < int(found[2]) else None

    @property
    def calibrated(self) -> bool:
        return not self.exact and (self.method != "magnitude" or self.sizes == "by-layer")

    @property
    def weighs(self) -> bool:
        """Whether outputs are weighed; where every row keeps as much, it makes no difference."""
        return self.method == "sparsegpt" and self.metric == "loss" and self.pattern is None

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when nothing that is selected can be made sparse."""
        params = ctx.select(self.where, skip=self.skip)
        if self.exact:
            return
        from passes.sparsify.reduce import reduce

        reduce(graph, ctx, self, params)
