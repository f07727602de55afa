"""Which operations one of ONNX Runtime's own does together: found on the graph, before anything is emitted.

An attention over cached keys takes in what makes its operands: heads, their norms, their rotation and, where they come
from one input, the projections. A norm takes in the sum before it. Other products of one input with codes of one
scheme, as of a gate and what it multiplies, are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from backends.onnx.cache import ATTENTION
from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.types import Dim

HEAD_STEP = 8  # kernels take widths of heads, and numbers of rotated pairs, that are multiples of it
SCORING = ("token_scores", "mul")  # what reads the queries and keys of an attention to score tokens
LIMITS = ("max_position_embeddings", "n_positions", "seq_length")


@dataclass(frozen=True)
class Operand:
    """What an attention's query, key or value is made of. ``flat`` [B, T, heads * d] has its heads side by side; then
    come ``norm`` over each head, ``rope`` and ``rounded``, which rounds to codes, where there are any."""

    flat: Value
    norm: Node | None
    rope: Node | None
    rounded: Node | None
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Grouped:
    """An attention that GroupQueryAttention computes. ``projections`` are its three linear maps when they have one
    input and no other reader, ``merge`` puts its heads side by side."""

    query: Operand
    key: Operand
    value: Operand
    projections: tuple[Node, ...]
    merge: Node | None


@dataclass
class Fusions:
    """``grouped`` by attention, ``skips`` the sum that a norm takes in, ``beside`` the linear maps that the first of
    them does too; ``absorbed`` are not emitted on their own. ``positions`` is how many positions tables of rotary
    embedding have."""

    grouped: dict[Node, Grouped] = field(default_factory=dict[Node, Grouped])
    skips: dict[Node, Node] = field(default_factory=dict[Node, Node])
    beside: dict[Node, tuple[Node, ...]] = field(default_factory=dict[Node, "tuple[Node, ...]"])
    absorbed: set[Node] = field(default_factory=set[Node])
    positions: int = 0


def fusions(graph: Graph, tokens: Sequence[Dim], *, joins: bool = True) -> Fusions:
    """What can be fused in ``graph``; attention only when it is cached along one of ``tokens``, linear maps beside one
    another only if it ``joins``."""
    found = Fusions(positions=position_limit(graph))
    _find_grouped(graph, tokens, found)
    order = {node: number for number, node in enumerate(graph.nodes)}
    for norm in graph.nodes_named("rms_norm", "layer_norm"):
        total = _skip(norm, order)
        if total is not None and total not in found.absorbed and norm not in found.absorbed:
            found.skips[norm] = total
            found.absorbed.add(total)
    found.absorbed.update(_tables(graph, found))
    if joins:
        _find_beside(graph, found)
    return found


def _find_beside(graph: Graph, found: Fusions) -> None:
    """One product reads its input once, and is one step less."""
    readers: dict[Value, list[Node]] = {}
    for node in graph.nodes_named("linear"):
        weight = node.input(1)
        coded = isinstance(weight, Param) and weight.expr.op == "dequantize"
        if coded and node not in found.absorbed and node.optional_input(2) is None:
            readers.setdefault(node.input(0), []).append(node)
    for nodes in readers.values():
        if len(nodes) > 1 and _one_scheme(nodes):
            found.beside[nodes[0]] = tuple(nodes)
            found.absorbed.update(nodes[1:])


def _tables(graph: Graph, found: Fusions) -> list[Node]:
    """Rotary tables that only absorbed operations read."""
    tables = graph.nodes_named("rope_table")
    return [node for node in tables if {user for value in node.outputs for user in value.users} <= found.absorbed]


def position_limit(graph: Graph) -> int:
    """How many positions the model is made for; 0 when its config does not say."""
    config = graph.origin.config or {}
    return next((int(config[name]) for name in LIMITS if config.get(name)), 0)


def _skip(norm: Node, order: dict[Node, int]) -> Node | None:
    """The sum of two values of one shape that ``norm`` reads, when nobody reads it earlier."""
    total = norm.input(0).node
    if total is None or total.op.name != "add" or len(total.inputs) != 2 or len(norm.inputs) < 2:
        return None
    alike = all(value is not None and value.shape == total.output.shape for value in total.inputs)
    first = min(total.output.users, key=lambda user: order[user])
    return total if alike and total.output.type.rank == 3 and first is norm else None


def _find_grouped(graph: Graph, tokens: Sequence[Dim], found: Fusions) -> None:
    shared: dict[Value | None, int] = {}
    for node in graph.nodes_named(*ATTENTION):
        shared[node.input(1)] = shared.get(node.input(1), 0) + 1
    for node in graph.nodes_named("attention"):
        if node.attr("causal") and node.input(1).shape[2] in tokens and shared[node.input(1)] == 1:
            made = _grouped(node, found.positions)
            if made is not None:
                found.grouped[node] = made
                parts = (made.query, made.key, made.value)
                found.absorbed.update(inner for part in parts for inner in part.nodes)
                found.absorbed.update([*made.projections, *([made.merge] if made.merge else [])])


def _grouped(node: Node, positions: int) -> Grouped | None:
    if node.optional_input(3) is not None or node.optional_input(4) is not None:
        return None
    width, depth = node.input(1).shape[3], node.input(2).shape[3]
    query, key, value = (_operand(node.input(index), node) for index in range(3))
    if query is None or key is None or value is None or width != depth or not isinstance(width, int):
        return None
    if width % HEAD_STEP or value.norm or value.rope or not _alike(query, key, positions):
        return None
    if query.rounded or bool(key.rounded) != bool(value.rounded):
        return None
    user = node.output.single_user()
    merge = user if user is not None and user.op.name == "merge_heads" else None
    normed = query.norm is not None or key.norm is not None
    return Grouped(query, key, value, () if normed else _projections(query, key, value), merge)


def _alike(query: Operand, key: Operand, positions: int) -> bool:
    """Whether queries and keys are rotated the same way, by tables that can be made beforehand."""
    if bool(query.rope) != bool(key.rope):
        return False
    if query.rope and key.rope:
        table = rotary_table_of(query.rope)
        same = query.rope.inputs[1:] == key.rope.inputs[1:] and query.rope.attrs == key.rope.attrs
        if not same or not positions or table is None or not isinstance(table.input(1), Param):
            return False
        if table.input(1).type.static_shape[0] % HEAD_STEP:
            return False
    return True


def rotary_table_of(rope: Node) -> Node | None:
    """What makes the table that ``rope`` turns by, all of it or some of its rows."""
    node = rope.input(1).node
    while node is not None and node.op.name == "token_take":
        node = node.input(0).node
    return node if node is not None and node.op.name == "rope_table" else None


def _operand(value: Value, attention: Node) -> Operand | None:
    """The chain from heads side by side to ``value``, of operations with no other reader; but what chooses tokens may
    read what ``attention`` does."""
    nodes: list[Node] = []
    if _is_shared(value, attention) and value.node is not None and value.node.op.name == "rope":
        nodes.append(value.node)
        split = _taken(value.node.input(0), "split_heads", nodes)
        return None if split is None else Operand(split.input(0), None, value.node, None, tuple(nodes))
    rounded = _taken(value, "fake_quantize", nodes)
    if rounded is not None and not _is_cached_code(rounded):
        return None
    value = rounded.input(0) if rounded else value
    rope = _taken(value, "rope", nodes)
    value = rope.input(0) if rope else value
    norm = _taken(value, "rms_norm", nodes)
    value = norm.input(0) if norm else value
    split = _taken(value, "split_heads", nodes)
    return None if split is None else Operand(split.input(0), norm, rope, rounded, tuple(nodes))


def _is_shared(value: Value, attention: Node) -> bool:
    """Whether more than ``attention`` reads ``value``, all of it to score tokens."""
    others = [user for user in value.users if user is not attention]
    return bool(others) and all(user.op.name in SCORING for user in others)


def _is_cached_code(node: Node) -> bool:
    """Whether ``node`` rounds to what kernels cache: int8 with one scale that is known beforehand."""
    return node.attr("type") == "int" and node.attr("bits") == 8 and bool(node.attr("scale"))


def _taken(value: Value, op: str, nodes: list[Node]) -> Node | None:
    node = value.node
    if node is None or node.op.name != op or value.single_user() is None:
        return None
    nodes.append(node)
    return node


def _projections(*operands: Operand) -> tuple[Node, ...]:
    """The linear maps of the operands, when they can be one; otherwise none."""
    nodes = [operand.flat.node for operand in operands]
    linears = [node for node in nodes if node is not None and node.op.name == "linear"]
    if len(linears) < len(nodes) or len({node.input(0) for node in linears}) > 1:
        return ()
    free = all(node.output.single_user() is not None and isinstance(node.input(1), Param) for node in linears)
    biased = {node.optional_input(2) is not None for node in linears}
    params = [value for node in linears if (value := node.optional_input(2)) is not None]
    whole = all(isinstance(param, Param) for param in params)
    return tuple(linears) if free and whole and len(biased) == 1 and _one_scheme(linears) else ()


def _one_scheme(linears: Sequence[Node]) -> bool:
    exprs = [node.input(1).expr for node in linears if isinstance(node.input(1), Param)]  # pyright: ignore
    schemes = {(e.attrs, len(e.args), e.dtype) if e.op == "dequantize" else None for e in exprs}
    return len(schemes) == 1
