"""Grouped-query attention as multi-head latent attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from compiler.errors import PassError
from compiler.ir.facts import attention_sites
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.pipeline import Context, Pass
from compiler.weights.ops.basic import tile
from passes.gqa_to_mla import weights as w
from passes.gqa_to_mla.sites import Convertible, Projection, convertible

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
        biased = biased_query or any(_has_bias(found) for found in sites)
        tables: dict[tuple[Node, int, float], Node] = {}
        for found in sites:
            _convert(graph, found, _table_for(graph, found, tables), biased, biased_query)
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
            raise PassError(*_refused(reasons, len(found)))
        for scope, reason in reasons.items():
            ctx.skipped(scope, reason)
        return found

    def _check_full(self, name: str, asked: int | str, width: int) -> None:
        if asked not in (FULL, width):
            option = name.replace("_", "-")
            raise PassError(f"{option} {asked} is not exact: the full one is {width} here", option=name,
                            remedy=f"write `{option}: full`, or leave it out")


def _refused(reasons: dict[str, str], converted: int) -> tuple[str]:
    if not reasons:
        return ("the model has no attention",)
    scope, reason = next(iter(reasons.items()))
    others = len(reasons) - 1
    more = f" (and {others} more layers have no exact form)" if others else ""
    rest = f"; {converted} layers could be converted with `layers: possible`" if converted else ""
    return (f"the attention in {scope} has no exact latent form: {reason}{more}{rest}",)


def _has_bias(found: Convertible) -> bool:
    return any(part.bias() is not None for part in (found.key, found.value)) or len(found.output.inputs) > 2


def _table_for(graph: Graph, found: Convertible, tables: dict[tuple[Node, int, float], Node]) -> Node:
    """The rotary table that repeats the site's frequencies for every group and carries the scale of its scores."""
    old, shape = found.table, found.shape
    scale = old.attr("scale") * _gain(found) ** 0.5
    key = (old, shape.groups, scale)
    if key not in tables:
        source = old.input(1)
        assert isinstance(source, Param)  # `convertible` accepts nothing else
        frequencies = graph.add_param(
            _free_name(graph, f"{source.name}_grouped"), tile(source.expr, 0, shape.groups), persistent=False
        )
        tables[key] = graph.append("rope_table", [old.input(0), frequencies], {"scale": scale}, scope=old.scope, before=old)
    return tables[key]


def _gain(found: Convertible) -> float:
    """What the scale of latent attention, one over the root of its head width, must be multiplied by."""
    return found.site.scale * (found.shape.unrotated + found.shape.rotary_dim) ** 0.5


def _free_name(graph: Graph, name: str) -> str:
    return next(c for c in (name, *(f"{name}_{i}" for i in range(len(graph.params)))) if c not in graph.params)


@dataclass
class _Builder:
    """Adds operations of one site in front of its attention, in its scope."""

    graph: Graph
    node: Node
    storage: torch.dtype

    def op(self, name: str, inputs: list[Value | None], **attrs: object) -> Value:
        return self.graph.op(name, inputs, attrs, scope=self.node.scope, before=self.node)

    def param(self, name: str, expr: w.Expr) -> Param:
        return self.graph.add_param(f"{self.node.scope}.{name}", expr, self.storage)


def _convert(graph: Graph, found: Convertible, table: Node, biased: bool, biased_query: bool) -> None:
    node, shape = found.site.node, found.shape
    build = _Builder(graph, node, found.query.storage)
    x = found.query.linear.input(0)
    values, keys = w.norm_constants(build.storage), w.norm_constants(build.storage, _gain(found))
    down = build.op("linear", [x, build.param("kv_down.weight", w.kv_down(shape, found.key.weight(), found.value.weight())),
                               build.param("kv_down.bias", _down_bias(found, build.storage)) if biased else None])
    latent = build.op("slice", [down], axis=2, start=0, stop=shape.rank)
    latent = build.op("rms_norm", [latent, build.param("kv_norm.weight", w.kv_norm(shape, values, keys, build.storage))],
                      eps=w.NORM_EPS)
    rotary = build.op("slice", [down], axis=2, start=shape.rank, stop=shape.rank + shape.rotary_dim)
    rotary = _rotated(build, build.op("split_heads", [rotary], heads=1), table)
    rotary = build.op("reshape", [rotary], shape=(*x.shape[:2], shape.rotary_dim))
    query = build.op("split_heads", [_query(build, found, x, biased_query)], heads=shape.heads)
    if shape.unrotated:
        width = shape.unrotated + shape.rotary_dim
        parts = [build.op("slice", [query], axis=3, start=0, stop=shape.unrotated),
                 _rotated(build, build.op("slice", [query], axis=3, start=shape.unrotated, stop=width), table)]
        query = build.op("concat", list(parts), axis=3)
    else:
        query = _rotated(build, query, table)
    up = build.param("kv_up.weight", w.kv_up(shape, values, keys, build.storage))
    score_scale = (shape.unrotated + shape.rotary_dim) ** -0.5
    result = build.op("latent_attention", [query, latent, rotary, up, found.site.mask], scale=score_scale, causal=True)
    graph.replace(node.output, result)
    if biased and len(found.output.inputs) == 2:
        _add_zero_bias(graph, found.output)


def _rotated(build: _Builder, x: Value, table: Node) -> Value:
    return build.op("rope", [x, *table.outputs], layout="interleaved-to-half")


def _query(build: _Builder, found: Convertible, x: Value, through_latent: bool) -> Value:
    shape, part = found.shape, found.query
    if not through_latent:
        return build.op("linear", [x, build.param("query.weight", w.query_heads(shape, part.weight()))])
    constants = w.norm_constants(build.storage)
    rows = part.stop - part.start
    bias = w.as_vector(w.shrunk(w.as_column(part.bias(), rows, build.storage)))
    latent = build.op("linear", [x, build.param("query_down.weight", w.shrunk(part.weight())),
                                 build.param("query_down.bias", bias)])
    norm = build.param("query_norm.weight", w.full((rows,), constants.weight, build.storage))
    latent = build.op("rms_norm", [latent, norm], eps=w.NORM_EPS)
    return build.op("linear", [latent, build.param("query_up.weight", w.query_up(shape, constants, build.storage))])


def _down_bias(found: Convertible, storage: torch.dtype) -> w.Expr:
    def column(part: Projection) -> w.Expr:
        return w.as_column(part.bias(), part.stop - part.start, storage)

    return w.as_vector(w.kv_down(found.shape, column(found.key), column(found.value)))


def _add_zero_bias(graph: Graph, linear: Node) -> None:
    weight = linear.input(1)
    assert isinstance(weight, Param)  # `attention_sites` finds linear maps with weights of their own
    name = _free_name(graph, f"{weight.name.removesuffix('.weight')}.bias")
    zeros = graph.add_param(name, w.full((int(weight.shape[0]),), 0.0, weight.storage), weight.storage)
    biased = graph.append("linear", [linear.input(0), weight, zeros], scope=linear.scope, before=linear)
    graph.replace(linear.output, biased.output)
    graph.erase(linear)


def _report(ctx: Context, found: Convertible) -> None:
    shape = found.shape
    ctx.rewrote(
        found.site.scope,
        f"{shape.heads} heads in {shape.groups} groups to a latent of {shape.rank} and a rotary key of {shape.rotary_dim}",
        cache_values_before=shape.groups * (shape.head_dim + shape.value_dim),
        cache_values_after=shape.rank + shape.rotary_dim,
        query_rows_before=shape.heads * shape.head_dim,
        query_rows_after=shape.heads * (shape.unrotated + shape.rotary_dim),
    )
