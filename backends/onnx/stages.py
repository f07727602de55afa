"""Prompts that lose tokens, in a model with a cache: what is new in each stage, and where its tokens stand.

What comes with an empty cache is a prompt. What comes later goes on whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from backends.onnx.builder import Builder
from backends.onnx.cache import PAST_AXIS, Cache, places_name, stage_name
from backends.onnx.masks import Staged
from compiler.ir.graph import Graph, Node
from compiler.ir.layers import layer_of
from compiler.ir.stages import Stage
from compiler.ir.types import Dim


@dataclass
class Stages:
    """The stages of the graph that is lowered, by the node that chooses their tokens."""

    build: Builder
    chosen: dict[Node, Stage] = field(default_factory=dict[Node, Stage])

    def begin(self) -> None:
        """Let sizes of stages be known: of a prompt what the graph says, later that of all new tokens."""
        build, tokens = self.build, self.build.masks.tokens
        for stage in self.chosen.values():
            build.axes[stage.dim] = f"{stage_name(self._number(stage))}_sequence"
            whole = build.dim(tokens)
            build.sizes[stage.dim] = build.op("Where", self._prompt(), build.computed(stage.count), whole)

    def own(self, stage: Stage, whole: ir.Value, there: ir.Value) -> ir.Value:
        """How many of its new tokens each sample goes on with, [B, 1]: ``whole`` are those that it came with, and
        ``there`` those that were in the stage before."""
        build, tokens = self.build, str(self.build.masks.tokens)
        part = build.op("Min", build.computed(stage.count, {tokens: whole}), there)
        return build.op("Where", self._prompt(), part, there)

    def enter(self, stage: Stage, index: ir.Value, flags: ir.Value) -> None:
        """Note where the tokens at ``index`` [B, K] of the stage before stand; those without ``flags`` are padding."""
        build, masks = self.build, self.build.masks
        cache = build.cache
        assert cache is not None  # stages are of models with one
        past, there = cache.places(stage.dim), build.op("Cast", flags, to=ir.DataType.BOOL)
        new = self._counted(past, flags) if stage.renumbered else self._kept(stage, index)
        new = build.op("Where", there, new, build.scalar(-1, torch.int64))
        keys = build.op("Concat", past, new, axis=1)
        zero = build.scalar(0, torch.int64)
        turns = build.op("Max", new, zero)
        masks.staged[stage.dim] = Staged(new, turns, keys, build.op("GreaterOrEqual", keys, zero))
        cache.leave(places_name(self._number(stage)), build.op("Identity", keys))
        if stage.places is not None:
            build.values[stage.places] = turns

    def _number(self, stage: Stage) -> int:
        return list(self.chosen.values()).index(stage)

    def _kept(self, stage: Stage, index: ir.Value) -> ir.Value:
        """The positions [B, K] that new tokens had in the stage before."""
        before = self.build.masks.staged.get(stage.before)
        old = self.build.masks.query_places() if before is None else before.new
        return self.build.op("GatherElements", old, index, axis=1)

    def _counted(self, past: ir.Value, flags: ir.Value) -> ir.Value:
        """Positions that go on from those of the stage's ``past`` tokens."""
        build, one = self.build, self.build.scalar(1, torch.int64)
        known = build.op("Cast", build.op("GreaterOrEqual", past, build.scalar(0, torch.int64)), to=ir.DataType.INT64)
        before = build.op("ReduceSum", known, build.ints(1), keepdims=1)
        return build.op("Add", before, build.op("Sub", build.op("CumSum", flags, one), one))

    def _prompt(self) -> ir.Value:
        """Whether nothing is cached, bool [1]."""
        build, masks = self.build, self.build.masks
        if "prompt" not in masks.made:
            total = build.op("Shape", masks.given, start=1, end=2)
            masks.made["prompt"] = build.op("Equal", total, build.dim(masks.tokens))
        found = masks.made["prompt"]
        assert found is not None  # made above
        return found


def stage_table(graph: Graph, cache: Cache, stages: Sequence[Stage]) -> str:
    """Which layers are in which stage, the name of its axes, and how many tokens of a prompt it goes on with; JSON."""
    layers: dict[Dim, list[int]] = {dim: [] for dim in (cache.tokens, *cache.stages)}
    for node in graph.nodes_named("attention", "latent_attention"):
        layer = layer_of(node.scope)
        if layer is not None and cache.new(node) in layers:
            layers[cache.new(node)].append(layer.index)
    counts: dict[Dim, Dim] = {cache.tokens: cache.tokens, **{stage.dim: stage.count for stage in stages}}
    rows = [
        {
            "layers": layers[dim],
            "past": cache.axis(dim, PAST_AXIS),
            "kept": str(counts[dim]),
            "positions": "renumber" if any(stage.dim == dim and stage.renumbered for stage in stages) else "keep",
        }
        for dim in layers
    ]
    return json.dumps(rows)
