"""What a generated model's cache holds for each layer."""

from __future__ import annotations

from typing import Any

from compiler.ir.graph import Graph, Node

CACHE_LAYERS = {
    "rounded": "RoundedLayer",
    "rounded latent window": "SlidingRoundedLatentLayer",
    "rounded window": "SlidingRoundedLayer",
    "latent window": "SlidingLatentLayer",
    "window": "SlidingLayer",
}
"""What layers of a cache there are, and their classes."""


def cache_context(graph: Graph, bits: int, part: str = "") -> dict[str, Any]:
    """What the template of the cache needs to know; ``part`` is the part of the model that has the cached layers."""
    start = f"config.{part}_" if part else "config."
    latent, plain = graph.nodes_named("latent_attention"), _keyed(graph)
    return {
        "latent_softcap": any(node.attr("softcap") for node in latent),
        "cache_doc": f"Past tokens' {_held(latent, plain)}; of layers with a window only those within it.",
        "rounded_doc": _held(latent, plain).capitalize(),
        "cache_kinds": cache_kinds(graph, bits),
        "cache_bits": bits,
        "cache_layers": f"{start}num_hidden_layers",
        "rank": f"{start}kv_lora_rank[index]" if latent and plain else "",  # true of layers with a latent
    }


def cache_kinds(graph: Graph, bits: int) -> list[str]:
    """What layers of the cache there may be."""
    latent = {bool(node.attr("window")) for node in graph.nodes_named("latent_attention")}
    plain = {bool(node.attr("window")) for node in _keyed(graph)}
    windows = [kind for kind, found in (("latent window", latent), ("window", plain)) if True in found]
    rounded = [*(f"rounded {kind}" for kind in windows), *(["rounded"] if False in latent | plain else [])]
    return [*(rounded if bits else []), *windows] or ["full"]


def cache_helpers(kinds: list[str]) -> set[str]:
    """The classes that the layers of ``kinds`` are of, and what they call."""
    sliding = {"SlidingLayer"} if any("window" in kind for kind in kinds) else set[str]()
    latent = {"SlidingLatentLayer"} if "rounded latent window" in kinds else set[str]()
    rounding = {"pack", "unpack"} if any("rounded" in kind for kind in kinds) else set[str]()
    return {CACHE_LAYERS[kind] for kind in kinds if kind in CACHE_LAYERS} | sliding | latent | rounding


def _keyed(graph: Graph) -> list[Node]:
    """Attention whose keys and values are cached token by token."""
    return [node for node in graph.nodes_named("attention") if node.attr("causal")]


def _held(latent: list[Node], plain: list[Node]) -> str:
    return " or ".join([*(["keys and values"] if plain else []), *(["latents and rotary keys"] if latent else [])])
