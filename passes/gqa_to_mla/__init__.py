"""Grouped-query attention as multi-head latent attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from compiler.errors import PassError
from compiler.ir.facts import AttentionSite, attention_sites
from compiler.ir.graph import Graph
from compiler.pipeline import Context, Pass
from passes.gqa_to_mla.build import Tables, convert, has_bias, rotary_table
from passes.gqa_to_mla.sites import Convertible, convertible
from passes.gqa_to_mla.source import Source, compressible

FULL = "full"
Width = Annotated[int, Field(ge=0)] | Literal["full"]


@dataclass(frozen=True)
class GqaToMla(Pass):
    """Rewrite causal grouped-query (or multi-head) attention as multi-head latent attention, with a smaller cache.

    A token's cache becomes one latent of ``rank`` numbers and one rotary key of ``rope-dim`` numbers, both shared by
    all heads; or give ``cache``, the part of the source's cached numbers that may remain, and calibration decides how
    to split it. Without either, nothing is cut and the result computes what the source did.

    What is cut: of the rotary components of the keys, ``rope-dim`` / 2 stay, with their frequencies as they were; for
    the others a constant stands for the rotation between query and key, fitted by least squares. They and the values
    share the latent, a low-rank map chosen by what its errors would change behind the output projection. ``refit``
    then fits that projection to what the original attention yields from the same inputs. All of it follows from
    calibration data; nothing is trained.

    ``ranks: by-layer`` gives layers that matter more, by measurement, more of the same ``cache``; no stock class holds
    that. ``layers: possible`` leaves layers that have no latent form as they are, which no stock class can hold.
    Attention that is not causal, as of an encoder or to one, has no cache that grows, and is always left alone.

    Exact with ``rank: full`` and ``rope-dim: full``. Multi-head latent attention: DeepSeek-V2, arXiv 2405.04434;
    conversion: TransMLA, arXiv 2502.07864; the rest is on the pass's page of the documentation.
    """

    rank: Width = FULL
    rope_dim: Width = FULL
    cache: Annotated[float, Field(gt=0, lt=1)] | None = None
    ranks: Literal["uniform", "by-layer"] = "uniform"
    refit: bool = True
    layers: Literal["all", "possible"] = "all"

    exact_when: ClassVar = {"rank": FULL, "rope_dim": FULL, "cache": None}

    def __post_init__(self) -> None:
        if self.cache is not None and (self.rank, self.rope_dim) != (FULL, FULL):
            raise PassError(
                "`cache` chooses rank and rope-dim itself",
                option="cache",
                remedy="give either `cache`, or `rank` and `rope-dim`",
            )
        if self.ranks != "uniform" and self.cache is None:
            raise PassError(
                "`ranks: by-layer` shares out a `cache`, and none is given",
                option="ranks",
                remedy="add `cache: 50%`, or leave `ranks` out",
            )

    @property
    def calibrated(self) -> bool:
        """A part of the cache is; numbers may be the full widths, which the model has to say."""
        return self.cache is not None

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when a layer has no latent form, or when the widths asked for do not fit it."""
        sites = self._causal(graph, ctx)
        standard = [convertible(site) for site in sites]
        if self._truncates(sites):
            from passes.gqa_to_mla.reduce import reduce_cache

            reduce_cache(graph, ctx, self, self._compressible(sites, ctx))
        elif all(isinstance(found, Convertible) for found in standard):
            self._convert_exactly(graph, ctx, [found for found in standard if isinstance(found, Convertible)])
        else:
            from passes.gqa_to_mla.whole import convert_whole

            convert_whole(graph, ctx, self._compressible(sites, ctx))
        graph.prune()

    def _causal(self, graph: Graph, ctx: Context) -> list[AttentionSite]:
        """The attention whose cache grows with every token; any other beside it is left alone, whatever `layers` says.

        Raises PassError when there is none.
        """
        sites = attention_sites(graph)
        if not any(site.causal for site in sites):
            latent = bool(graph.nodes_named("latent_attention"))
            raise _refused({site.scope: "it is not causal" for site in sites}, 0, latent)
        for site in sites:
            if not site.causal:
                across = site.node.input(0).shape[2] != site.node.input(1).shape[2]
                ctx.skipped(site.scope, "it attends to another sequence" if across else "it is not causal")
        return [site for site in sites if site.causal]

    def _truncates(self, sites: Sequence[AttentionSite]) -> bool:
        """Whether the widths are less than the full ones anywhere (a number that is the full width is exact)."""
        widths = [_full_widths(site) for site in sites]
        full = [self.rank in (FULL, width[0]) and self.rope_dim in (FULL, width[1]) for width in widths if width]
        return not self.exact and (self.cache is not None or not full or not all(full))

    def _convert_exactly(self, graph: Graph, ctx: Context, sites: Sequence[Convertible]) -> None:
        biased_query = any(found.query.bias() is not None for found in sites)
        biased = biased_query or any(has_bias(found) for found in sites)
        tables: Tables = {}
        for found in sites:
            convert(graph, found, rotary_table(graph, found, tables), biased, biased_query)
            _report(ctx, found)

    def _compressible(self, sites: Sequence[AttentionSite], ctx: Context) -> list[Source]:
        """The sites that have a latent form; others are refused, or reported as skipped."""
        results = {site.scope: compressible(site) for site in sites}
        reasons = {scope: item for scope, item in results.items() if isinstance(item, str)}
        if len(reasons) == len(results) or (reasons and self.layers == "all"):
            raise _refused(reasons, len(results) - len(reasons), False)
        for scope, reason in reasons.items():
            ctx.skipped(scope, reason)
        return [item for item in results.values() if isinstance(item, Source)]


def _full_widths(site: AttentionSite) -> tuple[int, int] | None:
    """Rank and rotary width at which nothing is cut; None where there is no latent form."""
    found = convertible(site)
    if isinstance(found, Convertible):
        return found.shape.rank, found.shape.rotary_dim
    source = compressible(site)
    if isinstance(source, str):
        return None
    rotary = 2 * source.pairs * source.groups
    return source.cached - rotary, rotary


def _refused(reasons: dict[str, str], converted: int, latent: bool) -> PassError:
    if not reasons:
        return PassError(
            "the model's attention is latent already" if latent else "the model has no attention",
            remedy="leave `gqa-to-mla` out for this model",
        )
    scope, reason = next(iter(reasons.items()))
    count = len(reasons) - 1
    more = f" ({count} more {'layer has' if count == 1 else 'layers have'} none either)" if count else ""
    remedy = f"`layers: possible` converts the other {converted}, for which no stock class exists" if converted else ""
    return PassError(f"the attention in {scope} has no latent form: {reason}{more}", remedy=remedy)


def _report(ctx: Context, found: Convertible) -> None:
    shape = found.shape
    ctx.rewrote(
        found.site.scope,
        f"a latent of {shape.rank} and a rotary key of {shape.rotary_dim} for {shape.groups} groups",
        cache_values_before=shape.groups * (shape.head_dim + shape.value_dim),
        cache_values_after=shape.rank + shape.rotary_dim,
        query_rows_before=shape.heads * shape.head_dim,
        query_rows_after=shape.heads * shape.latent_head_dim,
    )
