"""Rotations of what flows through a model, so that nothing stands out that few bits would have to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from compiler.errors import PassError
from compiler.ir.graph import Graph
from compiler.pipeline import Context, Pass

Kind = Literal["values", "stream", "mlp"]


@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate activations and fold the rotations into weights (QuaRot, arXiv 2404.00456; SpinQuant, 2405.16406).

    ``what``, one or several: `values`, each head's values, by a Hadamard matrix in the value and output projections.
    `stream`, the residual stream, by a Hadamard matrix with random signs, drawn with ``seed``: scales of norms go into
    what reads them, heads that share the embedding's table get a matrix of their own, and layer norms become root mean
    squares. `mlp`, what the last projection of an MLP reads, while the model runs: an operation that its own class has
    no place for. Widths that are no powers of two get a Hadamard matrix times a cosine transform.

    ``learn`` is a number of steps in which the stream's matrix is learned (SpinQuant), on calibration data, so that the
    model with the layers' matrices rounded to nearest, in ``bits`` and groups of ``group``, is near to the original.
    It is kept where windows that are held out agree.

    Exact: what is computed stays the same until something is rounded. No calibration data is needed, but to learn.
    """

    what: Kind | tuple[Kind, ...] = ("values", "stream")
    seed: Annotated[int, Field(ge=0)] = 0
    learn: Annotated[int, Field(ge=0)] = 0
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group: Annotated[int, Field(ge=0)] = 0

    exact_when: ClassVar[Mapping[str, Any] | None] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.what,) if isinstance(self.what, str) else tuple(dict.fromkeys(self.what))

    @property
    def calibrated(self) -> bool:
        return self.learn > 0

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when nothing can be rotated, or learned as the options say."""
        if self.learn and "stream" not in self.kinds:
            raise PassError("a matrix is learned for streams alone", option="learn", remedy="say `what: [stream]`")
        unused = [name for name in ("bits", "group") if getattr(self, name) != getattr(Rotate, name)]
        if unused and not self.learn:
            cause = "nothing is rounded where nothing is learned"
            raise PassError(cause, option=unused[0], remedy="give `learn` steps")
        from passes.rotate.reduce import rotate

        rotate(graph, ctx, self)
