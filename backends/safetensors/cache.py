"""Rounded keys and values: taken out of a graph for a class that has none, and named as what its cache holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from backends.safetensors.rounding import Rounding, rounding_of
from backends.safetensors.unify import Mismatch
from compiler.ir.graph import Graph, Node
from compiler.ir.layers import copy_of
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import literal

OPERANDS = {"k_scale": 1, "v_scale": 2}  # of attention
Rounded = dict[str, Rounding]


@dataclass(frozen=True)
class Cache:
    """The ``kv_cache_scheme`` of a config, and the scales that go with it."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Expr]


def without_rounded_cache(graph: Graph) -> tuple[Graph, list[Rounded]]:
    """``graph`` with exact keys and values, and how each attention, in order, rounds them; nothing if none does."""
    if not any(_rounded(node) for node in graph.nodes_named("attention")):
        return graph, []
    plain = copy_of(graph)
    found = [_rounded(node) for node in plain.nodes_named("attention")]
    for node, ways in zip(plain.nodes_named("attention"), found, strict=True):
        for name in ways:
            maker = node.input(OPERANDS[name]).node
            assert maker is not None  # it is what rounds
            plain.set_input(node, OPERANDS[name], maker.input(0))
    plain.prune()
    return plain, found


def _rounded(node: Node) -> Rounded:
    makers = {name: node.input(index).node for name, index in OPERANDS.items()}
    return {name: rounding_of(maker) for name, maker in makers.items() if maker and maker.op.name == "fake_quantize"}


def cache_of(
    target: Graph, rounded: Sequence[Rounded], names: Collection[str], dtype: torch.dtype
) -> Cache | Mismatch | None:
    """What the files of a ``target`` with tensors ``names``, stored in ``dtype``, say of a rounded cache."""
    if not rounded:
        return None
    scopes = [node.scope for node in target.nodes_named("attention")]
    kinds = {way.kind for ways in rounded for way in ways.values()}
    if len(scopes) != len(rounded) or any(len(ways) < len(OPERANDS) for ways in rounded) or len(kinds) > 1:
        return Mismatch("caches are rounded in one way in all layers or in none")
    kind = kinds.pop()
    if not kind.scale:
        return Mismatch("files hold a scale for what is cached; take it from calibration")
    renamed = [scope for scope in scopes if not any(name.startswith(f"{scope}.") for name in names)]
    if renamed:
        return Mismatch(f"files hold {renamed[0]} under another name, where no scale of a cache is read")
    scales = {
        f"{scope}.{name}": way.scale for scope, ways in zip(scopes, rounded, strict=True) for name, way in ways.items()
    }
    return Cache(kind.config(), {key: literal([scale], dtype=dtype) for key, scale in scales.items()})
