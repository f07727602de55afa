"""The sizes that a graph has, as the config of the class that it came from spells them.

Classes call one size by several names; a size goes under every name that the config has for it. Whether the class then
builds what the graph is, is not decided here: the proposal is captured and compared.
"""

from __future__ import annotations

import re
from typing import Any

from compiler.ir.facts import attention_sites, expert_sites, mlp_sites
from compiler.ir.graph import Graph, Node
from compiler.ir.layers import segments, subgraph

INNER = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim")
EXPERT_INNER = ("moe_intermediate_size", "intermediate_size")
HEADS = ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads", "decoder_attention_heads")
HIDDEN = ("hidden_size", "d_model", "n_embd", "word_embed_proj_dim")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
PARTS = {"text_config": ("text", "language"), "vision_config": ("vision", "visual"), "audio_config": ("audio",)}
"""Configs within a config, and words in the paths of what they are of."""


def smaller_config(graph: Graph, config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with the sizes of ``graph``, where one size serves for all of its layers: of those below the same
    config, where it has several in it."""
    nested = {name: _within(graph, PARTS[name]) for name in PARTS if isinstance(config.get(name), dict)}
    parts = {name: subgraph(graph, nodes, graph.name) for name, nodes in nested.items()}
    others = {node for nodes in nested.values() for node in nodes}
    rest = subgraph(graph, [node for node in graph.nodes if node not in others], graph.name) if nested else graph
    tokens = {} if graph.tokens is None else _set(config, ("vocab_size",), {len(graph.tokens)})
    own = {**tokens, **_layers(rest, config), **_inner(rest, config), **_heads(rest, config)}
    return {**config, **own, **{name: smaller_config(part, config[name]) for name, part in parts.items()}}


def _within(graph: Graph, words: tuple[str, ...]) -> list[Node]:
    """What of ``graph`` is computed in modules whose path has one of ``words`` in it."""
    return [node for node in graph.nodes if not {*words}.isdisjoint(re.split(r"[._]", node.scope))]


def _inner(graph: Graph, config: dict[str, Any]) -> dict[str, Any]:
    """The widths of MLPs and experts, and the number of experts."""
    widths = {site.down.input(0).shape[-1] for site in mlp_sites(graph)}
    experts = expert_sites(graph)
    found = _set(config, INNER, widths)
    if experts and not (widths and EXPERT_INNER[0] not in config):
        own = EXPERT_INNER[:1] if EXPERT_INNER[0] in config else EXPERT_INNER[1:]
        found |= _set(config, own, {site.down.shape[2] for site in experts})
    return found | _set(config, EXPERTS, {site.count for site in experts})


def _heads(graph: Graph, config: dict[str, Any]) -> dict[str, Any]:
    """The numbers of heads, and the width of what they write to; their own width where it no longer follows."""
    sites = attention_sites(graph)
    heads, groups = {site.heads for site in sites}, {site.groups for site in sites}
    found = _set(config, HEADS, heads)
    found |= _set(config, ("num_key_value_heads",), groups)
    widths = {site.output.input(1).shape[0] for site in sites if site.output is not None}
    found |= _set(config, HIDDEN, widths)
    changed = any(config.get(name) != size for name, size in found.items() if name in HEADS + HIDDEN)
    widths = {site.head_dim for site in sites}
    return found | ({"head_dim": widths.pop()} if changed and len(widths) == 1 else {})


def _layers(graph: Graph, config: dict[str, Any]) -> dict[str, Any]:
    """The number of layers of the only stack; lists with an entry for each layer lose those of layers that are gone."""
    kept: dict[str, list[int]] = {}
    for layer, _ in segments(graph):
        if layer is not None:
            kept.setdefault(layer.stack, []).append(layer.index)
    name = next((name for name in LAYERS if isinstance(config.get(name), int)), None)
    if len(kept) != 1 or name is None:
        return {}
    (indices,), before = kept.values(), config[name]
    if len(indices) >= before:
        return {}
    lists = {key: value for key, value in config.items() if isinstance(value, list) and len(value) == before}
    return {name: len(indices), **{key: [value[index] for index in indices] for key, value in lists.items()}}


def _set(config: dict[str, Any], names: tuple[str, ...], sizes: set[Any]) -> dict[str, Any]:
    """The one size under every name of ``config`` that has another number."""
    if len(sizes) != 1:
        return {}
    (size,) = sizes
    return {name: size for name in names if name in config and config[name] != size}
