"""Which attention can become latent attention without changing what it computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compiler.ir.facts import AttentionSite
from compiler.ir.graph import Node, Param, Value
from compiler.weights.expr import Expr
from compiler.weights.ops.basic import cast, slice
from passes.gqa_to_mla.weights import Shape


@dataclass(frozen=True)
class Projection:
    """Rows [start, stop) of a linear map, and the rotary embedding of the heads they make."""

    linear: Node
    rope: Node | None
    start: int
    stop: int

    @property
    def storage(self) -> torch.dtype:
        return _param(self.linear, 1).storage

    def weight(self) -> Expr:
        """The rows of the weight, in its storage dtype."""
        return slice(cast(_param(self.linear, 1).expr, self.storage), 0, self.start, self.stop)

    def bias(self) -> Expr | None:
        if self.linear.optional_input(2) is None:
            return None
        return slice(_param(self.linear, 2).expr, 0, self.start, self.stop)


@dataclass(frozen=True)
class Convertible:
    """An attention site with what its conversion needs."""

    site: AttentionSite
    query: Projection
    key: Projection
    value: Projection
    shape: Shape

    @property
    def rope(self) -> Node:
        assert self.query.rope is not None  # `convertible` has checked
        return self.query.rope

    @property
    def table(self) -> Node:
        """The rotary table."""
        table = self.rope.input(1).node
        assert table is not None  # `convertible` has checked
        return table

    @property
    def output(self) -> Node:
        assert self.site.output is not None  # `convertible` has checked
        return self.site.output


def convertible(site: AttentionSite) -> Convertible | str:
    """The site with its projections, or the reason why it has no exact latent form."""
    reason = _attention_reason(site)
    if reason:
        return reason
    parts = [projection(site.node.input(index)) for index in range(3)]
    for name, part in zip(("query", "key", "value"), parts, strict=True):
        if isinstance(part, str):
            return f"its {name} reaches attention through {part}"
    query, key, value = (part for part in parts if isinstance(part, Projection))
    return _projection_reason(query, key, value) or Convertible(site, query, key, value, _shape(site, query))


def _attention_reason(site: AttentionSite) -> str:
    if not site.causal:
        return "it is not causal"
    if site.query_norm is not None or site.key_norm is not None:
        return "it normalises its queries or keys, which is not linear in the input"
    if site.window:
        return f"it slides a window of {site.window} tokens, which latent attention cannot"
    if site.softcap:
        return f"it bends its scores at {site.softcap:g}, which latent attention cannot"
    if site.sinks is not None:
        return "it has attention sinks"
    if site.bias is not None:
        return "it adds a bias to its scores"
    return "" if site.output is not None else "its output is not read by one linear map"


def projection(value: Value) -> Projection | str:
    """How ``value`` [B, H, T, d] comes from a linear map, split into heads and maybe rotated, or what prevents it."""
    node, rope = value.node, None
    if node is not None and node.op.name == "rope":
        rope, node = node, node.input(0).node
    if node is None or node.op.name != "split_heads":
        return _named(node)
    node = node.input(0).node
    start, stop = 0, int(value.shape[1]) * int(value.shape[3])
    if node is not None and node.op.name == "slice" and node.attr("axis") in (2, -1) and node.attr("step") == 1:
        start, stop = int(node.attr("start")), int(node.attr("stop"))
        node = node.input(0).node
    if node is None or node.op.name != "linear":
        return _named(node)
    weights = [operand for operand in node.inputs[1:] if operand is not None]
    return Projection(node, rope, start, stop) if all(isinstance(w, Param) for w in weights) else "a computed weight"


def _named(node: Node | None) -> str:
    return f"`{node.op.name}`" if node is not None else "nothing but the model's input"


def _projection_reason(query: Projection, key: Projection, value: Projection) -> str:
    if len({part.linear.input(0) for part in (query, key, value)}) != 1:
        return "its queries, keys and values are not made from one input"
    if query.rope is None or key.rope is None:
        return "it has no rotary embedding"
    if value.rope is not None:
        return "it rotates its values"
    if query.rope.inputs[1:] != key.rope.inputs[1:] or query.rope.attrs != key.rope.attrs:
        return "it rotates queries and keys differently"
    table = query.rope.input(1).node
    if table is None or table.op.name != "rope_table" or not isinstance(table.input(1), Param):
        return "its rotary frequencies are not constants"
    if query.storage == torch.float16:
        return "float16 cannot hold weights shrunk by 2^-30; store the model in bfloat16 or float32 first"
    return ""


def _shape(site: AttentionSite, query: Projection) -> Shape:
    assert query.rope is not None  # the caller has checked
    return Shape(
        heads=site.heads,
        groups=site.groups,
        head_dim=site.head_dim,
        value_dim=site.value_dim,
        pairs=int(query.rope.input(1).shape[-1]),
        interleaved=query.rope.attr("layout") != "half",
    )


def _param(node: Node, index: int) -> Param:
    value = node.input(index)
    assert isinstance(value, Param)  # `projection` accepts nothing else
    return value
