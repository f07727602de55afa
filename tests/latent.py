"""Graphs of latent attention as compressing passes make them: random weights, sizes that differ from layer to layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compiler.ir.facts import AttentionSite, attention_sites
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.weights.expr import load
from compiler.weights.source import MemorySource


def latent_graph(
    graph: Graph, ranks: Sequence[int], pairs: Sequence[int], *, normed: bool = False, seed: int = 5
) -> Graph:
    """``graph`` with latent attention of ranks r and 2 * pairs rotary elements (0: none), one for each causal
    attention; -1 leaves one as it is. The latents go through a norm when ``normed``. Changes ``graph``.
    """
    builder = _Builder(graph, torch.Generator().manual_seed(seed))
    sites = [site for site in attention_sites(graph) if site.causal]
    for site, rank, count in zip(sites, ranks, pairs, strict=True):
        if rank >= 0:
            builder.convert(site, rank, count, normed)
    graph.sources["latent"] = MemorySource(builder.tensors)
    graph.prune()
    return graph


class _Builder:
    def __init__(self, graph: Graph, generator: torch.Generator):
        self.graph, self.generator = graph, generator
        self.tensors: dict[str, torch.Tensor] = {}
        self.tables: dict[int, Node] = {}

    def param(self, name: str, *shape: int, shift: float = 0.0) -> Param:
        tensor = torch.randn(shape, generator=self.generator) * 0.15 + shift
        self.tensors[name] = tensor
        from compiler.ir.types import TensorType

        return self.graph.add_param(name, load("latent", name, TensorType(tensor.dtype, tuple(shape))))

    def table(self, site: AttentionSite, pairs: int) -> Node:
        """One table for all layers that keep as many pairs, as the compressing pass makes them."""
        if pairs not in self.tables:
            old = site.query_rope.input(1).node
            name = f"{old.input(1).name}_kept{f'_{len(self.tables)}' if self.tables else ''}"
            expr = load("latent", name, old.input(1).type.with_shape((pairs,)))
            self.tensors[name] = torch.rand(pairs, generator=self.generator)
            kept = self.graph.add_param(name, expr, persistent=False)
            self.tables[pairs] = self.graph.append("rope_table", [old.input(0), kept], scope=old.scope, before=old)
        return self.tables[pairs]

    def convert(self, site: AttentionSite, rank: int, pairs: int, normed: bool) -> None:
        node, scope = site.node, site.scope

        def op(name: str, inputs: list[Value | None], **attrs) -> Value:
            return self.graph.op(name, inputs, attrs, scope=scope, before=node)

        unrotated, rotated = 8, 2 * pairs
        x, heads = self.source(site, op), site.heads
        down = op("linear", [x, self.param(f"{scope}.kv_down.weight", rank + rotated, x.shape[-1])])
        latent = op("slice", [down], axis=2, start=0, stop=rank) if rotated else down
        if normed:
            norm = self.param(f"{scope}.kv_norm.weight", rank, shift=1.0)
            latent = op("rms_norm", [latent, norm], eps=1e-6)
        made = op("linear", [site.query.input(0), self.query(site, heads * (unrotated + rotated))])
        query, rotary = op("split_heads", [made], heads=heads), None
        if rotated:
            table = self.table(site, pairs)
            key = op("split_heads", [op("slice", [down], axis=2, start=rank, stop=rank + rotated)], heads=1)
            key = op("rope", [key, *table.outputs], layout="interleaved-to-half")
            rotary = op("reshape", [key], shape=(*x.shape[:2], rotated))
            passed = op("slice", [query], axis=3, start=0, stop=unrotated)
            turned = op("slice", [query], axis=3, start=unrotated, stop=unrotated + rotated)
            turned = op("rope", [turned, *table.outputs], layout="interleaved-to-half")
            query = op("concat", [passed, turned], axis=3)
        up = self.param(f"{scope}.kv_up.weight", heads * (unrotated + site.value_dim), rank)
        attrs = {"scale": (unrotated + rotated) ** -0.5, "window": site.window, "softcap": site.softcap}
        self.graph.replace(node.output, op("latent_attention", [query, latent, rotary, up], causal=True, **attrs))

    def query(self, site: AttentionSite, rows: int) -> Param:
        return self.param(f"{site.scope}.query.weight", rows, site.query.input(0).shape[-1])

    def source(self, site: AttentionSite, op) -> Value:
        """What the latent is made from: the layer's input, or where keys are normed those keys beside the values."""
        if site.key_norm is None:
            return site.query.input(0)
        flat = []
        for value in (site.key_norm.output, site.node.input(2)):
            turned = op("transpose", [value], perm=(0, 2, 1, 3))
            flat.append(op("merge_heads", [turned]))
        return op("concat", flat, axis=2)
