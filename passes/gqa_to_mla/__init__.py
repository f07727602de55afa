"""Grouped-query attention as multi-head latent attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from compiler.errors import PassError
from compiler.ir.facts import attention_sites
from compiler.ir.graph import Graph
from compiler.pipeline import Context, Pass
from passes.gqa_to_mla.build import Tables, convert, has_bias, rotary_table
from passes.gqa_to_mla.sites import Convertible, convertible

FULL = "full"


@dataclass(frozen=True)
class GqaToMla(Pass):
    """Rewrite causal grouped-query (or multi-head) attention as multi-head latent attention, exactly.

    A token's cache becomes one latent of its g values and one rotary key that holds its g rotated keys side by side:
    as many numbers as before. A head's query is its old one in its group's place and zeros elsewhere, so its product
    with the shared rotary key is the old score; the up-projection picks its group's value out of the latent. The
    query projection grows g-fold, the rotary table repeats its frequencies g times.

    The latent's norm is made harmless: its input is shrunk by 2^-30, where 1 / sqrt(mean square + 1e-6) is a
    constant, and what follows undoes both. The scale of the scores goes into the rotary table, so that no weight is
    multiplied by anything but powers of two. With biases the query takes a latent of full width likewise.

    ``rank`` and ``rope-dim`` are ``full`` or those widths; ``layers: possible`` leaves layers that have no exact form
    as they are, which no stock class can hold.

    Always exact. Multi-head latent attention: DeepSeek-V2, arXiv 2405.04434; conversion: TransMLA, arXiv 2502.07864.
    """

    rank: int | Literal["full"] = FULL
    rope_dim: int | Literal["full"] = FULL
    layers: Literal["all", "possible"] = "all"

    exact_when: ClassVar = {}

    def run(self, graph: Graph, ctx: Context) -> None:
        """Raises PassError when a layer has no exact latent form, or a rank other than the full one is asked."""
        sites = self._convertible(graph, ctx)
        for found in sites:
            self._check_full("rank", self.rank, found.shape.rank)
            self._check_full("rope_dim", self.rope_dim, found.shape.rotary_dim)
        biased_query = any(found.query.bias() is not None for found in sites)
        biased = biased_query or any(has_bias(found) for found in sites)
        tables: Tables = {}
        for found in sites:
            convert(graph, found, rotary_table(graph, found, tables), biased, biased_query)
            _report(ctx, found)
        graph.prune()

    def _convertible(self, graph: Graph, ctx: Context) -> list[Convertible]:
        found: list[Convertible] = []
        reasons: dict[str, str] = {}
        for site in attention_sites(graph):
            result = convertible(site)
            if isinstance(result, str):
                reasons[site.scope] = result
            else:
                found.append(result)
        if not found or (reasons and self.layers == "all"):
            latent = bool(graph.nodes_named("latent_attention"))
            raise _refused(reasons, len(found), latent)
        for scope, reason in reasons.items():
            ctx.skipped(scope, reason)
        return found

    def _check_full(self, name: str, asked: int | str, width: int) -> None:
        if asked not in (FULL, width):
            option = name.replace("_", "-")
            raise PassError(
                f"{option} {asked} is not exact: the full one is {width} here",
                option=name,
                remedy=f"write `{option}: full`, or leave it out",
            )


def _refused(reasons: dict[str, str], converted: int, latent: bool) -> PassError:
    if not reasons:
        return PassError("the model's attention is latent already" if latent else "the model has no attention")
    scope, reason = next(iter(reasons.items()))
    count = len(reasons) - 1
    more = f" ({count} more {'layer has' if count == 1 else 'layers have'} none either)" if count else ""
    remedy = f"`layers: possible` converts the other {converted}, for which no stock class exists" if converted else ""
    return PassError(f"the attention in {scope} has no exact latent form: {reason}{more}", remedy=remedy)


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
