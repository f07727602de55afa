"""What passes and reports ask of a graph: its sites, coupling groups and costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Set

import torch

from compiler.ir.coupling import CouplingGroup, Member, coupling_groups
from compiler.ir.execute import evaluate_dim
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.sites import (
    AttentionSite,
    ExpertSite,
    LatentSite,
    MlpSite,
    attention_sites,
    expert_sites,
    latent_sites,
    mlp_sites,
    static,
)
from compiler.ir.types import Dim

__all__ = [
    "AttentionSite",
    "CouplingGroup",
    "ExpertSite",
    "LatentSite",
    "Member",
    "MlpSite",
    "attention_sites",
    "coupling_groups",
    "expert_sites",
    "flops_per_token",
    "image_size",
    "kv_cache_values",
    "latent_sites",
    "mlp_sites",
    "model_dtype",
    "parameter_count",
]


LONG = 1 << 20  # tokens, of which parts are taken where their number is not known


def what_is_apart(graph: Graph) -> tuple[str, ...]:
    """A sentence on the modules of the source's class that take no part in ``graph``: none where all do."""
    names = graph.origin.apart
    return (f"it holds nothing of {', '.join(names)}, which take no part in what was captured",) if names else ()


def parameter_count(graph: Graph) -> int:
    """Elements of all weights that a checkpoint holds; tied weights once."""
    return sum(param.type.numel for param in graph.params.values() if param.persistent)


def model_dtype(graph: Graph) -> torch.dtype:
    """The dtype that most of the floating weights are stored in, which is the one the model runs in."""
    counts = Counter[torch.dtype]()
    for param in graph.params.values():
        if param.storage.is_floating_point and param.persistent:
            counts[param.storage] += param.type.numel
    return counts.most_common(1)[0][0] if counts else torch.float32


def image_size(graph: Graph) -> dict[str, int | list[int]]:
    """``image_size`` of a config, as the pictures that ``graph`` takes have it; nothing where it takes none."""
    pixels = graph.inputs.get("pixel_values")
    if pixels is None or pixels.type.rank != 4:
        return {}
    height, width = (int(size) for size in pixels.shape[2:])
    return {"image_size": height if height == width else [height, width]}


def kv_cache_values(graph: Graph) -> int:
    """Values that one more token of one sequence adds to the cache, summed over causal attention.

    Grouped attention keeps G * (d + v) of each token, latent attention r + R. A window bounds the length of a cache,
    not the size of a token, so windowed attention counts in full. Keys that several layers share count once.
    """
    return sum(count * size for count, size in cached_vectors(graph))


def cached_vectors(graph: Graph) -> list[tuple[int, int]]:
    """How many vectors, and of which size, every cached tensor has of a token: [B, G, S, d] or [B, S, r]."""
    shared = {
        tuple(node.inputs[1:3]): node
        for node in graph.nodes_named("attention", "latent_attention")
        if node.attr("causal")
    }
    values = [value for node in shared.values() for value in (node.input(1), node.optional_input(2))]
    return [
        (static(value.shape[1]) if value.type.rank == 4 else 1, static(value.shape[-1]))
        for value in values
        if value is not None
    ]


def flops_per_token(graph: Graph) -> int:
    """Floating-point operations for one token at context length 0: two per weight that multiplies it.

    Linear maps and products with a weight count as often as they are applied, to each part of a token if they meet
    parts (heads, say), experts as many as a token visits, a convolution once per output position. Attention scores,
    which grow with the context, do not count. Where some tokens do not go on, what follows counts by the part that
    does.
    """
    parts = _parts(graph) if graph.nodes_named("token_take", "token_merge") else {}
    tokens = {node.input(index).shape[2] for node in graph.nodes_named("attention") for index in (0, 1)}
    flops = (_flops(node) * _pieces(node, tokens) * parts.get(node.outputs[0], 1.0) for node in graph.nodes)
    return round(sum(flops))


def _pieces(node: Node, tokens: Set[Dim]) -> int:
    """Into how many vectors a token is cut that the linear map ``node`` meets: axes beside those of samples and tokens.

    ``tokens`` are the sizes of axes of tokens, apart from those that only inputs tell.
    """
    if node.op.name != "linear":
        return 1
    between = node.input(0).shape[1:-1]
    others = [dim for dim in between if isinstance(dim, int) and dim not in tokens]
    return math.prod(others) if len(others) < len(between) else 1


def _parts(graph: Graph) -> dict[Value, float]:
    """The part of the tokens that go through each value."""
    parts: dict[Value, float] = {}
    long = {dim: LONG for value in graph.inputs.values() for dim in value.shape if isinstance(dim, str)}
    for node in graph.nodes:
        given = [parts.get(value, 1.0) for value in node.inputs if value is not None and not isinstance(value, Param)]
        part = min(given, default=1.0)
        if node.op.name in ("token_take", "token_merge"):
            axis = node.attr("axis") if node.op.name == "token_take" else 1
            after, before = (evaluate_dim(value.shape[axis], long) for value in (node.outputs[0], node.input(0)))
            part = given[0] * after / before
        elif node.op.name == "token_restore":
            part = given[0]
        parts.update(dict.fromkeys(node.outputs, part))
    return parts


def _flops(node: Node) -> int:
    match node.op.name:
        case "linear" | "conv":
            return 2 * math.prod(map(static, node.input(1).shape))
        case "matmul":
            return sum(2 * value.type.numel for value in node.inputs if isinstance(value, Param))
        case "latent_attention":
            return 2 * math.prod(map(static, node.input(3).shape))
        case "experts":
            per_expert = sum(math.prod(map(static, node.input(i).shape[1:])) for i in (3, 4))
            return 2 * static(node.input(1).shape[1]) * per_expert
        case _:
            return 0
