"""What a generated model's cache holds for each layer."""

from __future__ import annotations

from typing import Any

from compiler.ir.graph import Graph, Node

CACHE_LAYERS = {
    "window": "SlidingLayer",
    "latent window": "SlidingLatentLayer",
    "rounded": "RoundedLatentLayer",
    "rounded window": "SlidingRoundedLatentLayer",
}
"""Classes of layers that a module gets when its cache has some of the kind."""


def cache_context(graph: Graph, bits: int, part: str = "") -> dict[str, Any]:
    """What the template of the cache needs to know; ``part`` is the part of the model that has the cached layers."""
    start = f"config.{part}_" if part else "config."
    latent, plain = graph.nodes_named("latent_attention"), _keyed(graph)
    return {
        "latent_softcap": any(node.attr("softcap") for node in latent),
        "cache_doc": _doc(bool(latent), bool(plain)),
        "cache_kinds": cache_kinds(graph, bits),
        "cache_bits": bits,
        "cache_layers": f"{start}num_hidden_layers",
        "rank": f"{start}kv_lora_rank[index]" if latent and plain else "",  # true of layers with a latent
    }


def cache_kinds(graph: Graph, bits: int) -> list[str]:
    """What layers of the cache there may be."""
    latent = {bool(node.attr("window")) for node in graph.nodes_named("latent_attention")}
    plain = {bool(node.attr("window")) for node in _keyed(graph)}
    kinds = ["window"] if True in latent | plain else []
    kinds += ["rounded"] if bits and False in latent else []
    kinds += ["rounded window"] if bits and True in latent else []
    kinds += ["latent window"] if True in latent else []
    kinds += ["plain window"] if True in plain else []
    return kinds or ["full"]


def _keyed(graph: Graph) -> list[Node]:
    """Attention whose keys and values are cached token by token."""
    return [node for node in graph.nodes_named("attention") if node.attr("causal")]


def _doc(latent: bool, plain: bool) -> str:
    held = " or ".join([*(["keys and values"] if plain else []), *(["latents and rotary keys"] if latent else [])])
    return f"Past tokens' {held}; of layers with a window only those within it."
