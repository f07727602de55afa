"""Attention, MLP and expert sites: which linear maps play which part, found by walking the graph.

Nothing here looks at a name. An attention's query projection is the linear map that its first operand comes from, by
way of operations that keep tokens apart (norms, rotary embedding, head splitting, layout); an MLP is an activation
between linear maps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.layers import layer_of

_LAYOUT = {"split_heads", "merge_heads", "reshape", "transpose", "slice", "concat", "expand", "cast", "pad"}
_NORMS = {"rms_norm", "layer_norm"}
_ARITHMETIC = {"add", "sub", "mul", "div"}
_PROJECTED = _LAYOUT | _NORMS | _ARITHMETIC | {"rope", "neg"}
ACTIVATIONS = frozenset({"silu", "gelu", "relu", "sigmoid", "tanh"})
_GATED = ACTIVATIONS | _ARITHMETIC | {"pow", "minimum", "maximum", "cast", "slice"}

_TURNED = ("hadamard", "fake_quantize")
"""What passes put in front of the last linear map of an MLP, which stays that."""


@dataclass(frozen=True)
class Path:
    """The way from a value back to the linear map it comes from: that map and the nodes passed, nearest first."""

    linear: Node | None
    passed: tuple[Node, ...]

    def first(self, *ops: str) -> Node | None:
        """The nearest passed node of one of these operations."""
        return next((node for node in self.passed if node.op.name in ops), None)


@dataclass(frozen=True)
class AttentionSite:
    """One ``attention`` node and what surrounds it. A projection is None when its path is not one linear map.

    ``heads`` query heads share ``groups`` key/value heads; ``head_dim`` is the width of queries and keys.
    ``layer`` is the scope of the numbered module the site lies in ("" outside of any).
    """

    node: Node
    query: Node | None
    key: Node | None
    value: Node | None
    output: Node | None
    heads: int
    groups: int
    head_dim: int
    value_dim: int
    query_rope: Node | None
    key_rope: Node | None
    query_norm: Node | None
    key_norm: Node | None
    layer: str

    @property
    def scale(self) -> float:
        return self.node.attr("scale")

    @property
    def causal(self) -> bool:
        return self.node.attr("causal")

    @property
    def window(self) -> int:
        return self.node.attr("window")

    @property
    def softcap(self) -> float:
        return self.node.attr("softcap")

    @property
    def mask(self) -> Value | None:
        return self.node.optional_input(3)

    @property
    def bias(self) -> Value | None:
        return self.node.optional_input(4)

    @property
    def sinks(self) -> Value | None:
        return self.node.optional_input(5)

    @property
    def scope(self) -> str:
        return self.node.scope

    @property
    def attends_itself(self) -> bool:
        """Whether queries, keys and values are projections of one value."""
        maps = (self.query, self.key, self.value)
        return len({node and node.input(0) for node in maps}) == 1 and None not in maps


@dataclass(frozen=True)
class LatentSite:
    """One ``latent_attention`` node. ``query_up`` makes the heads, ``query_down`` its latent (None without one).

    ``kv_down`` makes the latent and ``rotary_key`` the rotated key; they are one linear map where both are made
    together. ``up`` is the up-projection [heads * (unrotated + value_dim), rank]. Without a rotary embedding
    ``rotary_dim`` is 0 and ``rotary_key`` None.
    """

    node: Node
    query_down: Node | None
    query_up: Node | None
    kv_down: Node | None
    rotary_key: Node | None
    up: Value
    output: Node | None
    latent_norm: Node | None
    heads: int
    rank: int
    rotary_dim: int
    unrotated_dim: int
    value_dim: int
    layer: str

    @property
    def scale(self) -> float:
        return self.node.attr("scale")

    @property
    def causal(self) -> bool:
        return self.node.attr("causal")

    @property
    def window(self) -> int:
        return self.node.attr("window")

    @property
    def softcap(self) -> float:
        return self.node.attr("softcap")

    @property
    def mask(self) -> Value | None:
        return self.node.optional_input(4)

    @property
    def scope(self) -> str:
        return self.node.scope


@dataclass(frozen=True)
class MlpSite:
    """``down(activation(gate(x)) * up(x))``, or without a gate ``down(activation(up(x)))``.

    ``gate`` and ``up`` are the same node where one linear map makes both halves.
    """

    gate: Node | None
    up: Node
    down: Node
    activation: Node
    layer: str

    @property
    def scope(self) -> str:
        return self.activation.scope


@dataclass(frozen=True)
class ExpertSite:
    """One ``experts`` node: ``count`` experts of which each token visits ``active``, as ``router`` scores them."""

    node: Node
    router: Node | None
    gate_up: Value
    down: Value
    count: int
    active: int
    layer: str

    @property
    def scope(self) -> str:
        return self.node.scope


def attention_sites(graph: Graph) -> list[AttentionSite]:
    """Every ``attention`` node with its surroundings, in order."""
    return [_attention_site(node) for node in graph.nodes_named("attention")]


def latent_sites(graph: Graph) -> list[LatentSite]:
    """Every ``latent_attention`` node with its surroundings, in order."""
    return [_latent_site(node) for node in graph.nodes_named("latent_attention")]


def mlp_sites(graph: Graph) -> list[MlpSite]:
    """Every linear map whose operand is made of linear maps by an activation, in order."""
    return [site for node in graph.nodes_named("linear") if (site := _mlp_site(node)) is not None]


def expert_sites(graph: Graph) -> list[ExpertSite]:
    """Every ``experts`` node with its router, in order."""
    return [_expert_site(node) for node in graph.nodes_named("experts")]


def layer_scope(node: Node) -> str:
    layer = layer_of(node.scope)
    return layer.scope if layer else ""


def static(dim: int | str) -> int:
    """A dim that is an integer in every graph the operations accept."""
    if isinstance(dim, str):
        raise ValueError(f"the dim {dim} is symbolic")
    return dim


def path_to_linear(value: Value) -> Path:
    """Walk back from ``value`` to the one linear map it comes from; several or none give no map."""
    linears, passed = _walk_back(value, _PROJECTED)
    return Path(linears[0] if len(linears) == 1 else None, tuple(passed))


def _walk_back(value: Value, through: Iterable[str]) -> tuple[list[Node], list[Node]]:
    """The linear maps reached from ``value`` through operations in ``through``, and the nodes passed.

    Parameters (a norm's weight, a bias) end the walk without a result; anything else makes the result empty.
    """
    linears: dict[Node, None] = {}
    passed: dict[Node, None] = {}
    pending: list[Value] = [value]
    while pending:
        node = pending.pop(0).node
        if node is None or node in passed or node in linears:
            continue
        if node.op.name == "linear":
            linears[node] = None
        elif node.op.name in through:
            passed[node] = None
            pending += _followed(node)
        else:
            return [], list(passed)
    return list(linears), list(passed)


def _followed(node: Node) -> list[Value]:
    """The operands that hold the value being walked: not the rotary tables or a norm's weights."""
    operands = node.inputs if node.op.name in _ARITHMETIC | {"concat", "minimum", "maximum", "pow"} else node.inputs[:1]
    return [value for value in operands if value is not None and not isinstance(value, Param)]


def _walk_forward(value: Value) -> Node | None:
    """The one linear map that reads ``value`` by way of layout operations, norms and gates."""
    found: dict[Node, None] = {}
    pending = list(value.users)
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op.name == "linear":
            found[node] = None
        elif node.op.name in _LAYOUT | _NORMS | {"mul"}:
            pending += [user for output in node.outputs for user in output.users]
    return next(iter(found)) if len(found) == 1 else None


def _attention_site(node: Node) -> AttentionSite:
    query, key, value = (path_to_linear(node.input(i)) for i in range(3))
    return AttentionSite(
        node=node,
        query=query.linear,
        key=key.linear,
        value=value.linear,
        output=_walk_forward(node.output),
        heads=static(node.input(0).shape[1]),
        groups=static(node.input(1).shape[1]),
        head_dim=static(node.input(0).shape[3]),
        value_dim=static(node.input(2).shape[3]),
        query_rope=query.first("rope"),
        key_rope=key.first("rope"),
        query_norm=query.first(*_NORMS),
        key_norm=key.first(*_NORMS),
        layer=layer_scope(node),
    )


def _latent_site(node: Node) -> LatentSite:
    query, latent = (path_to_linear(node.input(i)) for i in range(2))
    rotary = node.optional_input(2)
    query_down = path_to_linear(query.linear.input(0)).linear if query.linear else None
    width, rotary_dim = static(node.input(0).shape[3]), static(rotary.shape[-1]) if rotary else 0
    return LatentSite(
        node=node,
        query_down=query_down,
        query_up=query.linear,
        kv_down=latent.linear,
        rotary_key=path_to_linear(rotary).linear if rotary else None,
        up=node.input(3),
        output=_walk_forward(node.output),
        latent_norm=latent.first(*_NORMS),
        heads=static(node.input(0).shape[1]),
        rank=static(node.input(1).shape[-1]),
        rotary_dim=rotary_dim,
        unrotated_dim=width - rotary_dim,
        value_dim=static(node.output.shape[3]),
        layer=layer_scope(node),
    )


def _mlp_site(down: Node) -> MlpSite | None:
    read = down.input(0)
    while read.node is not None and read.node.op.name in _TURNED:
        read = read.node.input(0)
    linears, passed = _walk_back(read, _GATED)
    activations = [node for node in passed if node.op.name in ACTIVATIONS]
    if not activations or not 1 <= len(linears) <= 2 or len({node.input(0) for node in linears}) != 1:
        return None
    activated, _ = _walk_back(activations[-1].input(0), _GATED)
    if len(activated) != 1:
        return None
    halves = any(node.op.name == "slice" for node in passed)
    gated = len(linears) == 2 or halves
    up = next((node for node in linears if node is not activated[0]), activated[0])
    return MlpSite(activated[0] if gated else None, up, down, activations[-1], layer_scope(down))


def _expert_site(node: Node) -> ExpertSite:
    return ExpertSite(
        node=node,
        router=_nearest_linear(node.input(1)),
        gate_up=node.input(3),
        down=node.input(4),
        count=static(node.input(3).shape[0]),
        active=static(node.input(1).shape[1]),
        layer=layer_scope(node),
    )


def _nearest_linear(value: Value) -> Node | None:
    """The linear map or matrix product nearest above ``value``, whatever lies between."""
    pending: list[Value] = [value]
    seen: set[Node] = set()
    while pending:
        node = pending.pop(0).node
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op.name == "linear":
            return node
        pending += [operand for operand in node.inputs if operand is not None]
    return None
