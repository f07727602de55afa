"""The graph of latent attention, put where grouped attention was."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.weights.ops.basic import tile
from passes.gqa_to_mla import weights as w
from passes.gqa_to_mla.sites import Convertible, Projection

Tables = dict[tuple[Node, int, float], Node]


def has_bias(found: Convertible) -> bool:
    """Whether keys, values or the output have a bias."""
    return any(part.bias() is not None for part in (found.key, found.value)) or len(found.output.inputs) > 2


def rotary_table(graph: Graph, found: Convertible, tables: Tables) -> Node:
    """The rotary table that repeats the site's frequencies for every group and carries the scale of its scores."""
    old, shape = found.table, found.shape
    scale = old.attr("scale") * _gain(found) ** 0.5
    key = (old, shape.groups, scale)
    if key not in tables:
        source = old.input(1)
        assert isinstance(source, Param)  # `convertible` accepts nothing else
        frequencies = graph.add_param(
            free_name(graph, f"{source.name}_grouped"), tile(source.expr, 0, shape.groups), persistent=False
        )
        inputs = [old.input(0), frequencies]
        tables[key] = graph.append("rope_table", inputs, {"scale": scale}, scope=old.scope, before=old)
    return tables[key]


def _gain(found: Convertible) -> float:
    """What the scale of latent attention, one over the root of its head width, must be multiplied by."""
    return found.site.scale * found.shape.latent_head_dim**0.5


def free_name(graph: Graph, name: str) -> str:
    return next(c for c in (name, *(f"{name}_{i}" for i in range(len(graph.params)))) if c not in graph.params)


@dataclass
class Builder:
    """Adds operations of one site in front of its attention, in its scope."""

    graph: Graph
    node: Node
    storage: torch.dtype

    def op(self, name: str, inputs: list[Value | None], **attrs: object) -> Value:
        return self.graph.op(name, inputs, attrs, scope=self.node.scope, before=self.node)

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        return self.op("slice", [x], axis=axis, start=start, stop=stop)

    def rotate(self, x: Value, table: Node) -> Value:
        return self.op("rope", [x, *table.outputs], layout="interleaved-to-half")

    def param(self, name: str, expr: w.Expr) -> Param:
        return self.graph.add_param(f"{self.node.scope}.{name}", expr, self.storage)


def convert(graph: Graph, found: Convertible, table: Node, biased: bool, biased_query: bool) -> None:
    """Replace one attention. ``biased`` asks for biases on the way down and out, zero where there was none."""
    shape = found.shape
    build = Builder(graph, found.site.node, found.query.storage)
    latent, rotary = _keys_and_values(build, found, table, biased)
    query = _query(build, found, table, biased_query)
    values, keys = _constants(found)
    up = build.param("kv_up.weight", w.kv_up(shape, values, keys, build.storage))
    inputs = [query, latent, rotary, up, found.site.mask]
    result = build.op("latent_attention", inputs, scale=shape.latent_head_dim**-0.5, causal=True)
    graph.replace(found.site.node.output, result)
    if biased and len(found.output.inputs) == 2:
        add_zero_bias(graph, found.output)


def _constants(found: Convertible) -> tuple[w.NormConstants, w.NormConstants]:
    """For values, and for unrotated keys, whose scores the rotary table cannot scale."""
    return w.norm_constants(found.query.storage), w.norm_constants(found.query.storage, _gain(found))


def _keys_and_values(build: Builder, found: Convertible, table: Node, biased: bool) -> tuple[Value, Value]:
    """The normed latent [B, T, r] and the rotated key [B, T, R]."""
    shape, x = found.shape, found.query.linear.input(0)
    weight = build.param("kv_down.weight", w.kv_down(shape, found.key.weight(), found.value.weight()))
    bias = build.param("kv_down.bias", _down_bias(found, build.storage)) if biased else None
    down = build.op("linear", [x, weight, bias])
    norm = build.param("kv_norm.weight", w.kv_norm(shape, *_constants(found), build.storage))
    latent = build.op("rms_norm", [build.slice(down, 2, 0, shape.rank), norm], eps=w.NORM_EPS)
    key = build.slice(down, 2, shape.rank, shape.rank + shape.rotary_dim)
    rotated = build.rotate(build.op("split_heads", [key], heads=1), table)
    return latent, build.op("reshape", [rotated], shape=(*x.shape[:2], shape.rotary_dim))


def _down_bias(found: Convertible, storage: torch.dtype) -> w.Expr:
    def column(part: Projection) -> w.Expr:
        return w.as_column(part.bias(), part.stop - part.start, storage)

    return w.as_vector(w.kv_down(found.shape, column(found.key), column(found.value)))


def _query(build: Builder, found: Convertible, table: Node, through_latent: bool) -> Value:
    """The queries [B, H, T, n + R]."""
    shape, x = found.shape, found.query.linear.input(0)
    if through_latent:
        made = _latent_query(build, found, x)
    else:
        made = build.op("linear", [x, build.param("query.weight", w.query_heads(shape, found.query.weight()))])
    query = build.op("split_heads", [made], heads=shape.heads)
    if not shape.unrotated:
        return build.rotate(query, table)
    passed = build.slice(query, 3, 0, shape.unrotated)
    rotated = build.rotate(build.slice(query, 3, shape.unrotated, shape.latent_head_dim), table)
    return build.op("concat", [passed, rotated], axis=3)


def _latent_query(build: Builder, found: Convertible, x: Value) -> Value:
    """The queries before their heads are split, by way of a latent: the only place where the class has a bias."""
    part, constants = found.query, w.norm_constants(build.storage)
    rows = part.stop - part.start
    weight = build.param("query_down.weight", w.shrunk(part.weight()))
    bias = build.param("query_down.bias", w.as_vector(w.shrunk(w.as_column(part.bias(), rows, build.storage))))
    norm = build.param("query_norm.weight", w.full((rows,), constants.weight, build.storage))
    latent = build.op("rms_norm", [build.op("linear", [x, weight, bias]), norm], eps=w.NORM_EPS)
    up = build.param("query_up.weight", w.query_up(found.shape, constants, build.storage))
    return build.op("linear", [latent, up])


def add_zero_bias(graph: Graph, linear: Node) -> None:
    weight = linear.input(1)
    assert isinstance(weight, Param)  # `attention_sites` finds linear maps with weights of their own
    name = free_name(graph, f"{weight.name.removesuffix('.weight')}.bias")
    zeros = graph.add_param(name, w.full((int(weight.shape[0]),), 0.0, weight.storage), weight.storage)
    biased = graph.append("linear", [linear.input(0), weight, zeros], scope=linear.scope, before=linear)
    graph.replace(linear.output, biased.output)
    graph.erase(linear)
