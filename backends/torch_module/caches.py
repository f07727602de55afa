"""What a generated model's cache holds for each layer.

The caches are those of transformers, dynamic and static. They hold keys and values, or a latent and a rotary key as
those of one head; where they are rounded, the bytes that ``pack`` makes of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backends.kernels.decoding import row_bytes
from compiler.ir.facts import cached_vectors
from compiler.ir.graph import Graph
from compiler.ir.layers import layer_of


def cache_context(graph: Graph, bits: int) -> dict[str, Any]:
    """What the templates of attention and of caches need to know."""
    keyed = any(node.attr("causal") for node in graph.nodes_named("attention"))
    return {
        "first_cached": first_cached(graph),
        "latent_softcap": any(node.attr("softcap") for node in graph.nodes_named("latent_attention")),
        "rounded_keys": bool(bits and keyed),
        "cache_bits": bits,
    }


def cached_bytes(graph: Graph, bits: int) -> int:
    """Bytes that one more token of one sequence takes where what is cached has ``bits`` 8 or 4: what ``pack`` makes."""
    return sum(count * row_bytes(size, bits) for count, size in cached_vectors(graph) if size)


def first_cached(graph: Graph) -> int:
    """The first layer of which something is cached: it knows how many tokens came before."""
    nodes = [node for node in graph.nodes_named("attention", "latent_attention") if node.attr("causal")]
    return min((layer.index for node in nodes if (layer := layer_of(node.scope))), default=0)


def cache_helpers(graph: Graph, context: dict[str, Any]) -> set[str]:
    """What is called besides what operations call."""
    found = {"past_length", "causal_mask"}
    found |= {"pack", "unpack", "update_rounded", "decodes"} if context["cache_bits"] else set[str]()
    found |= {"cached_decode"} if context["rounded_keys"] else set[str]()
    found |= {"update_latents", "decodes"} if graph.nodes_named("latent_attention") else set[str]()
    return found | ({"eager_attention", "allowed"} if context["latent_softcap"] else set[str]())


def window_config(windows: Sequence[int | None]) -> dict[str, Any]:
    """Entries of the config for windows of layers: all of them, and what transformers makes its caches by.

    Its caches have one window. That of narrower ones is in their masks.
    """
    widest = max((window for window in windows if window), default=0)
    if not widest:
        return {}
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"attention_windows": list(windows), "layer_types": kinds, "sliding_window": widest}
