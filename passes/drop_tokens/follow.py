"""What reads a stream goes on with fewer of its tokens: tables, biases and masks lose the same ones, types follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Value
from compiler.ir.layers import layer_of
from compiler.ir.types import Dim, canonical_dim
from passes.drop_tokens.scores import Ops

UNABLE = ("conv", "pad", "embedding", "take", "token_select", "token_match", "token_merge", "token_restore")
FAR = 1e30
"""How much less than others the scores of tokens outside of a window are."""
LATER = "drop tokens behind later layers (`layers`), or leave `drop-tokens` out for this model"


@dataclass
class Following:
    """``index`` [B, K] are the places of the tokens that remain of ``tokens``; ``renumber`` counts positions anew.

    Every node of the layers in ``stack`` follows, or with ``until`` those before it. ``changed`` are the values that
    have fewer tokens by now, with the axis of these.
    """

    graph: Graph
    stack: str
    tokens: Dim
    index: Value
    renumber: bool
    until: Node | None = None
    changed: dict[Value, int] = field(default_factory=dict[Value, int])
    taken: dict[tuple[Value, int], Value] = field(default_factory=dict[tuple[Value, int], Value])
    near: dict[int, Value] = field(default_factory=dict[int, Value])
    attentions: list[Node] = field(default_factory=list[Node])

    @property
    def kept(self) -> Dim:
        """How many tokens values have now, one more than places with an extra one."""
        value, axis = next(iter(self.changed.items()))
        return value.shape[axis]

    def run(self, stream: Value, short: Value, first: Node) -> None:
        """Let ``short`` stand for ``stream`` in the layers, from the node ``first`` on. Raises PassError."""
        self.changed[short] = 1
        node: Node | None = first
        while node is not None and node.op.name != "root" and node is not self.until:
            following = node.following
            if self._inside(node):
                for place, value in enumerate(node.inputs):
                    if value is stream:
                        self.graph.set_input(node, place, short)
                if any(value in self.changed for value in node.inputs if value is not None):
                    self._follow(node)
            node = following

    def exits(self) -> list[Value]:
        """The values that something behind the layers reads, or that are outputs."""
        results = set(self.graph.outputs.values())
        return [v for v in self.changed if v in results or any(not self._follows(user) for user in v.users)]

    def _follows(self, user: Node) -> bool:
        """Whether what reads a changed value reads it as one of fewer tokens."""
        return self._inside(user) if self.until is None else any(v in self.changed for v in user.outputs)

    def _inside(self, node: Node) -> bool:
        layer = layer_of(node.scope)
        return layer is not None and layer.stack == self.stack

    def _follow(self, node: Node) -> None:
        if node.op.name in UNABLE or self._along_tokens(node):
            raise PassError(f"`{node.op.name}` in `{node.scope}` needs every token", remedy="name other `layers`")
        before = [value.type for value in node.outputs]
        self._operands(node)
        if "shape" in node.op.attrs:
            node.attrs = node.op.normalise_attrs({**node.attrs, "shape": self._shape(node)})
        after = node.op.infer_types([v and v.type for v in node.inputs], node.attrs, node.scope)
        for value, old, new in zip(node.outputs, before, after, strict=True):
            value.type = new
            axes = [axis for axis, pair in enumerate(zip(old.shape, new.shape, strict=True)) if pair[0] != pair[1]]
            if len(axes) > 1 and node.op.name not in ("attention", "matmul"):
                raise PassError(
                    f"`{node.op.name}` in `{node.scope}` has tokens along two axes",
                    remedy=LATER,
                )
            if axes:
                self.changed[value] = axes[0]

    def _along_tokens(self, node: Node) -> bool:
        """Whether ``node`` works along the axis of tokens itself."""
        value = next(v for v in node.inputs if v is not None and v in self.changed)
        attrs = node.op.all_attrs(node.attrs)
        axes = (*attrs.get("axes", ()), *([attrs["axis"]] if "axis" in attrs else []))
        return any(axis % value.type.rank == self.changed[value] for axis in axes)

    def _operands(self, node: Node) -> None:
        """Let the other operands of ``node`` lose the same tokens."""
        match node.op.name:
            case "rope":
                for place in (1, 2):
                    self._take(node, place, 1)
            case "attention" | "latent_attention":
                self._attention(node)
            case "linear" | "layer_norm" | "rms_norm" | "experts" | "matmul":
                pass
            case _:
                self._aligned(node)

    def _aligned(self, node: Node) -> None:
        """Operands of an elementwise operation, whose axes correspond counted from the last."""
        value = next(v for v in node.inputs if v is not None and v in self.changed)
        back = self.changed[value] - value.type.rank
        for place, other in enumerate(node.inputs):
            if other is None or other in self.changed or other.type.rank < -back or other.shape[back] != self.tokens:
                continue
            if other.type.rank == -back:
                op = Ops(self.graph, node.scope, node)
                self.graph.set_input(node, place, op("reshape", other, shape=(1, *other.shape)))
            self._take(node, place, back % node.input(place).type.rank)

    def _attention(self, node: Node) -> None:
        queries, keys = (node.input(place) in self.changed for place in range(2))
        causal, window = node.attr("causal"), node.attr("window")
        if queries != keys and (causal or window):
            raise PassError(
                f"the attention in `{node.scope}` has keys of other tokens than its queries",
                remedy=LATER,
            )
        plain = node.op.name == "attention"
        if keys:
            self.attentions.append(node)
            self._take(node, 3 if plain else 4, 1)
        if plain:
            for short, axis in ((queries, 2), (keys, 3)):
                if short:
                    self._take(node, 4, axis)
        if keys and window and not self.renumber:
            self._see_near(node, window, causal)

    def _take(self, node: Node, place: int, axis: int) -> None:
        """Let the operand at ``place`` lose tokens along ``axis``, if it has them there."""
        value = node.optional_input(place)
        if value is None or value in self.changed or value.shape[axis] != self.tokens:
            return
        key = value, axis
        if key not in self.taken:
            op = Ops(self.graph, _outside(self.stack), node)
            if self.renumber:
                self.taken[key] = op("slice", value, axis=axis, stop=self.index.shape[1])
            else:
                self.taken[key] = op("token_take", value, self.index, axis=axis)
        self.graph.set_input(node, place, self.taken[key])

    def _see_near(self, node: Node, window: int, causal: bool) -> None:
        """A window is one of places: a bias says what lies in it, as places are no longer numbers of tokens."""
        if node.op.name != "attention" or node.optional_input(4) is not None:
            raise PassError(
                f"the attention in `{node.scope}` has a window beside a bias",
                remedy=LATER,
            )
        if window not in self.near:
            op, (batch, count) = Ops(self.graph, _outside(self.stack), node), self.index.shape
            rows = op("reshape", self.index, shape=(batch, 1, count, 1))
            apart = op("sub", rows, op("reshape", self.index, shape=(batch, 1, 1, count)))
            near = op("compare", apart if causal else op("abs", apart), relation="lt", scalar=float(window))
            inside = op("cast", near, dtype=node.input(0).type.dtype)
            self.near[window] = op("mul", op("sub", inside, scalar=1.0), scalar=FAR)
        attrs = {**node.attrs, "window": 0}
        node.attrs = node.op.normalise_attrs(attrs)
        node.inputs += [None] * (5 - len(node.inputs))
        self.graph.set_input(node, 4, self.near[window])

    def _shape(self, node: Node) -> tuple[Dim, ...]:
        """The shape that ``node`` fills now."""
        shape: tuple[Dim, ...] = node.attr("shape")
        found = [made for axis in range(len(shape)) if (made := self._with(node, shape, axis)) is not None]
        if len(found) != 1:
            raise PassError(
                f"`{node.op.name}` in `{node.scope}` does not say which of its axes are tokens",
                remedy=LATER,
            )
        return found[0]

    def _with(self, node: Node, shape: tuple[Dim, ...], axis: int) -> tuple[Dim, ...] | None:
        dim = shape[axis]
        if isinstance(self.tokens, str):
            dims = {canonical_dim(f"({dim})*({self.kept})/({self.tokens})")} if self.tokens in str(dim) else set()
        else:
            dims = {dim // self.tokens * int(self.kept)} if isinstance(dim, int) and not dim % self.tokens else set()
        for made in dims:
            tried = (*shape[:axis], made, *shape[axis + 1 :])
            try:
                node.op.infer([v and v.type for v in node.inputs], {**node.op.all_attrs(node.attrs), "shape": tried})
            except ValueError:
                continue
            return tried
        return None


def _outside(stack: str) -> str:
    """A scope for what layers share."""
    return stack.rpartition(".")[0]


@dataclass(frozen=True)
class Readers:
    """What reads ``value`` behind the layers: nodes, and the names of outputs."""

    value: Value
    nodes: Sequence[Node]
    outputs: Sequence[str]

    @classmethod
    def of(cls, graph: Graph, stack: str, value: Value) -> Readers:
        nodes = [node for node in value.users if not node.scope.startswith(f"{stack}.")]
        return cls(value, nodes, [name for name, found in graph.outputs.items() if found is value])

    @property
    def any(self) -> bool:
        return bool(self.nodes or self.outputs)

    def read(self, graph: Graph, other: Value) -> None:
        """Let them read ``other`` instead."""
        for node in self.nodes:
            for place, operand in enumerate(node.inputs):
                if operand is self.value:
                    graph.set_input(node, place, other)
        graph.outputs |= dict.fromkeys(self.outputs, other)
