"""Low-rank factorisation of the weights of linear maps and convolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compiler.errors import PassError
from compiler.ir.graph import Graph
from compiler.ir.select import Selector
from compiler.pipeline import Context, Pass

Part = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class LowRank(Pass):
    """Replace weights by products of two smaller ones, so that ``keep`` of their parameters remain.

    With ``of: model``, ``keep`` is a part of the parameters of the whole model.

    W [m, n] becomes the matrix of rank r that is best by ``metric``: `loss` counts an error E of W by what it costs the
    model, tr(M E C E^T) with the second moments C of what enters W and M of the loss's gradient at what leaves it;
    `input` takes M = 1 (the optimum of SVD-LLM and of principal components of the output), `scaled` has only the sizes
    of inputs (ASVD) and `plain` nothing (the singular value decomposition of W).

    ``form``: a `pair` of factors holds r (m + n) numbers. `pivoted`, r of the outputs are computed from the input and
    the others from these, which holds r^2 numbers less for the same matrix (Pivoting Factorization, arXiv 2501.19090).
    `tensor-train` (CompactifAI, arXiv 2401.14109) makes a sum of Kronecker products of W, `tucker` (TensorLLM, arXiv
    2501.15674) shares two factors between the heads of a projection, and `sparse` (DSFormer, arXiv 2312.13211) has a
    first factor of which two of each four elements remain: other matrices than those of a rank, for linear maps.
    ``share``: weights that read the same `input`, such as query, key and value, may share the first factor, or those of
    a kind in two adjacent `layers`, whose inputs differ (Basis Sharing, arXiv 2410.03765). With `values`, value and
    output projections may have narrower heads, whose second factors are multiplied into the output projection; with
    `keys` query and key projections where keys are not rotated (MoDeGPT, arXiv 2408.09632).
    ``ranks``: `measured` shares the parameters out by predicted cost, leaves alone what does not pay, and keeps the
    result only if the whole model is nearer to the original than with the same part everywhere (`uniform`). `spectra`
    does so with one threshold for all singular values over the largest of their weight (WeLore, arXiv 2407.11239).
    ``update`` factorises in order what best repeats the original's outputs from inputs that have passed the factors
    before, and ``bias`` adds a bias that keeps the mean of every output.

    Exact with ``keep: 100%``. Nothing is trained.
    """

    where: Selector = "linear"
    skip: tuple[str, ...] = ()
    keep: Part = 1.0
    of: Literal["selected", "model"] = "selected"
    metric: Literal["loss", "input", "scaled", "plain"] = "loss"
    form: Literal["auto", "pair", "pivoted", "tensor-train", "tucker", "sparse"] = "auto"
    share: Literal["none", "input", "layers", "values", "keys"] = "none"
    ranks: Literal["measured", "spectra", "uniform"] = "measured"
    update: bool = False
    bias: bool = True

    exact_when: ClassVar = {"keep": 1.0}

    def __post_init__(self) -> None:
        kept = {"tensor-train": ("none",), "sparse": ("none",), "tucker": ("none", "input")}.get(self.form)
        if kept is not None and self.share not in kept:
            raise PassError(
                f"factors of the form `{self.form}` are not shared by `{self.share}`",
                option="share",
                remedy=f"write `share: {kept[-1]}`, or leave `form` out",
            )
        if self.ranks == "spectra" and self.form in ("tucker", "sparse"):
            raise PassError(
                f"`form: {self.form}` is made without singular values",
                option="ranks",
                remedy="write `ranks: measured`, or leave it out",
            )

    @property
    def calibrated(self) -> bool:
        return not self.exact and (self.metric != "plain" or self.ranks != "uniform" or self.update or self.bias)

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when nothing that is selected can be factorised, or so little cannot be kept."""
        params = ctx.select(self.where, skip=self.skip)
        if self.exact:
            return
        from passes.low_rank.reduce import reduce

        reduce(graph, ctx, self, params)
