"""The roles that weights play, from the structure of the graph alone.

A role such as ``attention.query`` also answers to its first part, ``attention``. Matrices, tables and kernels have
roles; of the vectors only those of norms do. A tied weight has the roles of all its uses.
"""

from __future__ import annotations

from collections.abc import Iterator

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.sites import attention_sites, expert_sites, latent_sites, mlp_sites

ROLES: dict[str, str] = {
    "attention": "every projection of attention",
    "attention.query": "makes queries",
    "attention.key": "makes keys",
    "attention.value": "makes values",
    "attention.output": "turns the attended heads back into the hidden state",
    "attention.query_down": "makes the latent of the queries",
    "attention.query_up": "makes queries from their latent",
    "attention.kv_down": "makes the latent and the rotary key that are cached",
    "attention.kv_up": "makes keys and values from the latent",
    "mlp": "every linear map of an MLP",
    "mlp.gate": "makes what is activated and multiplied",
    "mlp.up": "widens",
    "mlp.down": "narrows",
    "experts": "every stacked weight of experts",
    "experts.gate_up": "the gates and up-projections of all experts",
    "experts.down": "the down-projections of all experts",
    "router": "scores experts",
    "embedding": "a table looked up by position or token",
    "head": "a linear map that makes an output of the model",
    "norm": "scales and shifts of norms",
    "conv": "convolution kernels",
    "linear": "every weight of a linear map, heads and experts included",
}

_TO_OUTPUT = frozenset({"mul", "div", "add", "sub", "tanh", "cast", "reshape", "slice"})


def roles(graph: Graph) -> dict[Param, set[str]]:
    """The roles of every weight that has any, in order of first use."""
    found: dict[Param, set[str]] = {}
    for node in graph.nodes:
        for value in node.inputs:
            if isinstance(value, Param):
                found.setdefault(value, set())
    for value, role in _assignments(graph):
        if isinstance(value, Param):
            found[value].add(role)
    return {param: names for param, names in found.items() if names}


def has_role(names: set[str], role: str) -> bool:
    """Whether one of ``names`` is ``role`` or a part of it."""
    return any(name == role or name.startswith(f"{role}.") for name in names)


def _assignments(graph: Graph) -> Iterator[tuple[Value | None, str]]:
    for node in graph.nodes:
        yield from _by_operation(node)
    for site in attention_sites(graph):
        for part in ("query", "key", "value", "output"):
            yield _weight(getattr(site, part)), f"attention.{part}"
    for latent in latent_sites(graph):
        yield _weight(latent.query_down), "attention.query_down"
        yield _weight(latent.query_up), "attention.query_up" if latent.query_down else "attention.query"
        yield _weight(latent.kv_down), "attention.kv_down"
        yield _weight(latent.rotary_key), "attention.kv_down"
        yield latent.up, "attention.kv_up"
        yield _weight(latent.output), "attention.output"
    for mlp in mlp_sites(graph):
        for part in ("gate", "up", "down"):
            yield _weight(getattr(mlp, part)), f"mlp.{part}"
    for experts in expert_sites(graph):
        yield _weight(experts.router), "router"
    for value in graph.outputs.values():
        yield _weight(_head(value)), "head"


def _by_operation(node: Node) -> Iterator[tuple[Value | None, str]]:
    match node.op.name:
        case "linear":
            yield node.input(1), "linear"
        case "embedding" | "take":
            yield node.input(0), "embedding"
        case "rms_norm" | "layer_norm":
            yield from ((value, "norm") for value in node.inputs[1:])
        case "conv":
            yield node.input(1), "conv"
        case "latent_attention":
            yield node.input(3), "linear"
        case "experts":
            yield from ((node.input(3), "experts.gate_up"), (node.input(4), "experts.down"))
            yield from ((node.input(3), "linear"), (node.input(4), "linear"))
        case _:
            pass


def _weight(linear: Node | None) -> Value | None:
    return None if linear is None else linear.input(1)


def _head(output: Value) -> Node | None:
    """The linear map that makes ``output``, if only operations on one value (a soft cap, a scale) follow it."""
    node = output.node
    while node is not None and node.op.name in _TO_OUTPUT and len(_tensors(node)) == 1:
        node = _tensors(node)[0].node
    return node if node is not None and node.op.name == "linear" else None


def _tensors(node: Node) -> list[Value]:
    return [value for value in node.inputs if value is not None and not isinstance(value, Param)]
