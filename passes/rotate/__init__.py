"""Rotations of what flows through a model, so that nothing stands out that few bits would have to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

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

    Exact: what is computed stays the same until something is rounded. No calibration data is needed.
    """

    what: Kind | tuple[Kind, ...] = ("values", "stream")
    seed: Annotated[int, Field(ge=0)] = 0

    exact_when: ClassVar[Mapping[str, Any] | None] = {}

    @property
    def kinds(self) -> tuple[str, ...]:
        return (self.what,) if isinstance(self.what, str) else tuple(dict.fromkeys(self.what))

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when nothing can be rotated."""
        from passes.rotate.reduce import rotate

        rotate(graph, ctx, self)
