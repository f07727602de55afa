"""Put a latent attention with given matrices where a grouped attention was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import index
from passes.gqa_to_mla import weights as w
from passes.gqa_to_mla.build import Builder, free_name
from passes.gqa_to_mla.latent import LatentMaps, Layout
from passes.gqa_to_mla.sites import Projection
from passes.gqa_to_mla.source import Source

Keep = Callable[[str, Tensor], Expr]
Read = Callable[[Expr], Tensor]
Tables = dict[tuple[Node, tuple[int, ...]], Node]


@dataclass(frozen=True)
class Form:
    """How latent attention is written. ``standard``: as published, its latent normed (harmlessly) and its projections
    with biases where classes of it have them; otherwise as plainly as can be. ``biased`` and ``biased_query`` ask for
    those biases in every layer."""

    standard: bool
    biased: bool = False
    biased_query: bool = False


def form_of(graph: Graph, sources: Sequence[Source], layouts: Sequence[Layout]) -> Form:
    """As published where every layer is alike and linear; otherwise as plainly as can be."""
    uniform = len(set(layouts)) == 1 and layouts[0].rotary_dim > 0
    whole = len(sources) == len(graph.nodes_named("attention"))
    shrinkable = all(source.storage != torch.float16 for source in sources)
    if not (uniform and whole and shrinkable and all(source.plain for source in sources)):
        return Form(standard=False)
    parts = [part for source in sources for part in source.projections or ()]
    biased_query = any(source.projections[0].bias() is not None for source in sources if source.projections)
    biased = any(part.bias() is not None for part in parts)
    return Form(True, biased or any(len(source.output.inputs) > 2 for source in sources), biased_query)


@dataclass
class Truncation:
    """Rewrites attentions of one graph. ``keep`` stores a computed tensor, ``read`` evaluates an expression."""

    graph: Graph
    form: Form
    keep: Keep
    read: Read
    tables: Tables

    def convert(self, source: Source, layout: Layout, maps: LatentMaps) -> Node:
        """Put a latent attention beside that of ``source``, whose place it does not yet take."""
        node = source.site.node
        build = Builder(self.graph, node, source.storage)
        latent, rotary = self._latent(build, source, layout, maps)
        query = self._query(build, source, layout, maps)
        up = self._param(build, "kv_up.weight", maps.up * self._factor(source))
        scale = self._scale(source, maps)
        attrs = {"scale": scale, "causal": True, "window": source.site.window, "softcap": source.site.softcap}
        return self.graph.append("latent_attention", [query, latent, rotary, up], attrs, scope=node.scope, before=node)

    def _param(self, build: Builder, name: str, tensor: Tensor) -> Param:
        kept = self.keep(f"{build.node.scope}.{name}", tensor.to(build.storage))
        return build.param(name, kept)

    def _factor(self, source: Source) -> float:
        return w.norm_constants(source.storage).factor if self.form.standard else 1.0

    def _scale(self, source: Source, maps: LatentMaps) -> float:
        """What scores are multiplied by: published classes take it from the width of their queries."""
        return maps.query.shape[1] ** -0.5 if self.form.standard else source.site.scale

    def _table(self, source: Source, layout: Layout) -> Node:
        """The rotary table of the kept components, one for all layers that keep the same."""
        old = source.table
        frequencies = source.frequencies
        assert old is not None and frequencies is not None  # something was kept
        key = (old, layout.kept)
        if key not in self.tables:
            name = free_name(self.graph, f"{frequencies.name}_kept")
            kept = self.graph.add_param(name, index(frequencies.expr, 0, layout.frequencies), persistent=False)
            self.tables[key] = self.graph.append(
                "rope_table", [old.input(0), kept], {"scale": old.attr("scale")}, scope=old.scope, before=old
            )
        return self.tables[key]

    def _latent(self, build: Builder, source: Source, layout: Layout, maps: LatentMaps) -> tuple[Value, Value | None]:
        """The latent [B, T, r] and the rotated key [B, T, R]."""
        shrink = w.SHRINK if self.form.standard else 1.0
        matrix = torch.cat((maps.down * shrink, maps.rotary_key))
        down = self._down(build, source, matrix)
        latent = down if not layout.rotary_dim else build.slice(down, 2, 0, layout.rank)
        if self.form.standard:
            weight = torch.full((layout.rank,), w.norm_constants(source.storage).weight)
            latent = build.op("rms_norm", [latent, self._param(build, "kv_norm.weight", weight)], eps=w.NORM_EPS)
        if not layout.rotary_dim:
            return latent, None
        key = build.slice(down, 2, layout.rank, layout.cached)
        rotated = build.rotate(build.op("split_heads", [key], heads=1), self._table(source, layout))
        return latent, build.op("reshape", [rotated], shape=(*down.shape[:2], layout.rotary_dim))

    def _down(self, build: Builder, source: Source, matrix: Tensor) -> Value:
        """``matrix`` [r + R, Y] on a token's numbers, by way of the projections where those are linear."""
        if source.projections is None:
            numbers = build.op("concat", [_flat(build, source.key), _flat(build, source.value)], axis=2)
            return build.op("linear", [numbers, self._param(build, "kv_down.weight", matrix)])
        parts = source.projections[1:]
        weight = matrix @ torch.cat([self.read(part.weight()).double() for part in parts])
        bias = None
        if self.form.biased or any(part.bias() is not None for part in parts):
            bias = self._param(build, "kv_down.bias", matrix @ torch.cat([self._bias(part) for part in parts]))
        x = parts[0].linear.input(0)
        return build.op("linear", [x, self._param(build, "kv_down.weight", weight), bias])

    def _bias(self, part: Projection) -> Tensor:
        none = w.full((part.stop - part.start,), 0.0, torch.float64)
        return self.read(part.bias() or none).double()

    def _query(self, build: Builder, source: Source, layout: Layout, maps: LatentMaps) -> Value:
        """The queries [B, H, T, n + R], the rotary part rotated."""
        width = maps.query.shape[1]
        made = self._projected_query(build, source, maps.query * (source.site.scale / self._scale(source, maps)))
        if not layout.rotary_dim:
            return made
        table = self._table(source, layout)
        unrotated = width - layout.rotary_dim
        if not unrotated:
            return build.rotate(made, table)
        turned = build.rotate(build.slice(made, 3, unrotated, width), table)
        return build.op("concat", [build.slice(made, 3, 0, unrotated), turned], axis=3)

    def _projected_query(self, build: Builder, source: Source, maps: Tensor) -> Value:
        """``maps`` [H, n + R, d] on the query's heads before rotation, folded into its projection if it has one."""
        if source.projections is None:
            return build.op("matmul", [source.query, self._param(build, "query_map", maps.mT.contiguous())])
        part = source.projections[0]
        if self.form.standard and self.form.biased_query:
            return build.op("split_heads", [self._latent_query(build, part, maps)], heads=source.heads)
        weight = (maps @ self.read(part.weight()).double().reshape(*maps.shape[::2], -1)).flatten(0, 1)
        bias = None
        if part.bias() is not None:
            folded = maps @ self._bias(part).reshape(*maps.shape[::2], 1)
            bias = self._param(build, "query.bias", folded.flatten())
        made = build.op("linear", [part.linear.input(0), self._param(build, "query.weight", weight), bias])
        return build.op("split_heads", [made], heads=source.heads)

    def _latent_query(self, build: Builder, part: Projection, maps: Tensor) -> Value:
        """By way of a latent of full width, the only place where published classes have a bias."""
        constants = w.norm_constants(build.storage)
        weight = self._param(build, "query_down.weight", self.read(part.weight()).double() * w.SHRINK)
        bias = self._param(build, "query_down.bias", self._bias(part) * w.SHRINK)
        norm = self._param(build, "query_norm.weight", torch.full((part.stop - part.start,), constants.weight))
        down = build.op("linear", [part.linear.input(0), weight, bias])
        latent = build.op("rms_norm", [down, norm], eps=w.NORM_EPS)
        up = self._param(build, "query_up.weight", torch.block_diag(*maps) * constants.factor)
        return build.op("linear", [latent, up])


def take_over(graph: Graph, source: Source, latent: Node) -> None:
    """Let ``latent`` stand for the attention of ``source``, and erase what only that attention read."""
    graph.replace(source.site.node.output, latent.output)
    pending = [source.site.node]
    while pending:
        node = pending.pop()
        if node in graph and not any(output.users for output in node.outputs):
            pending += [value.node for value in node.inputs if value is not None and value.node is not None]
            graph.erase(node)


def _flat(build: Builder, heads: Value) -> Value:
    """[B, h, T, width] to [B, T, h*width]."""
    swapped = build.op("transpose", [heads], perm=(0, 2, 1, 3))
    batch, tokens, count, width = swapped.shape
    return build.op("reshape", [swapped], shape=(batch, tokens, int(count) * int(width)))
