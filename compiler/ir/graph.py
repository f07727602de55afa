"""The graph: values, nodes in SSA order, and parameters bound to weight expressions.

A graph is one flat list of operations. There are no regions and no control flow: a layer is a run of nodes
whose ``scope`` starts with the same module path. Use lists are kept up to date by every edit, so asking who
uses a value never scans the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from compiler.ir.opdef import OpDef
from compiler.ir.ops import op_named
from compiler.ir.types import TensorType

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from compiler.weights.expr import Expr
    from compiler.weights.source import Source


_ROOT = OpDef("root", "", infer=lambda types, attrs: [], eval=lambda: ())


@dataclass(eq=False)
class Value:
    """A typed tensor: a graph input, a parameter, or the output of a node."""

    name: str
    type: TensorType
    node: Node | None = None
    users: dict[Node, int] = field(default_factory=dict[Any, int], repr=False)

    @property
    def shape(self) -> tuple[int | str, ...]:
        return self.type.shape

    def single_user(self) -> Node | None:
        """The only node that reads this value, or None."""
        return next(iter(self.users)) if len(self.users) == 1 else None


@dataclass(eq=False)
class Param(Value):
    """A weight. ``name`` is its module path in the source model; ``expr`` says how its value is made.

    ``type.dtype`` is the dtype the graph computes in (float32 for floating weights), ``expr.type.dtype`` is what
    the expression yields. ``storage`` is the dtype of the dense tensor that is written; a parameter whose
    expression is a ``dequantize`` is written as its parts instead. ``aliases`` are further module paths of the
    same tensor (tied weights). A buffer that no checkpoint holds (a rotary table) has ``persistent=False``.
    """

    expr: Expr = field(kw_only=True)
    storage: torch.dtype = field(kw_only=True)
    aliases: tuple[str, ...] = field(default=(), kw_only=True)
    persistent: bool = field(default=True, kw_only=True)


@dataclass(eq=False)
class Node:
    """One operation. An optional input that is absent is None; attributes equal to their default are omitted."""

    op: OpDef
    inputs: list[Value | None]
    attrs: dict[str, Any]
    outputs: list[Value]
    scope: str = ""
    previous: Node | None = field(default=None, repr=False)
    following: Node | None = field(default=None, repr=False)

    @property
    def output(self) -> Value:
        """The only output."""
        (output,) = self.outputs
        return output

    def input(self, index: int) -> Value:
        """A required input."""
        value = self.inputs[index]
        if value is None:
            raise ValueError(f"{self.op.name} in {self.scope} has no input {index}")
        return value

    def optional_input(self, index: int) -> Value | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def attr(self, name: str) -> Any:
        """An attribute, or its default."""
        return self.attrs[name] if name in self.attrs else self.op.attrs[name].default


@dataclass(frozen=True)
class Origin:
    """Where a graph was captured from. Backends read it; passes must not.

    ``architecture`` is the transformers class name (None for a plain nn.Module), ``config`` its config as a dict,
    ``source`` the checkpoint (directory or GGUF file) the weights lie in, or None. ``apart`` are the modules of the
    class that have weights and take no part in the graph: the tower of pictures, of a graph that takes text alone.
    """

    architecture: str | None = None
    config: Mapping[str, Any] | None = None
    source: str | None = None
    apart: tuple[str, ...] = ()


class Graph:
    """A model as a flat list of typed operations.

    ``inputs`` and ``outputs`` map public names (``input_ids``, ``logits``) to values, in order. ``sources`` are the
    checkpoints that ``load`` expressions name; a graph captured from a config alone has none. ``tokens`` are those of
    the source that remain, in the order of their new numbers, where some were taken out.
    """

    def __init__(self, name: str, origin: Origin | None = None) -> None:
        self.name = name
        self.origin = origin or Origin()
        self.inputs: dict[str, Value] = {}
        self.params: dict[str, Param] = {}
        self.outputs: dict[str, Value] = {}
        self.sources: dict[str, Source] = {}
        self.tokens: tuple[int, ...] | None = None
        self._root = Node(_ROOT, [], {}, [])
        self._root.previous = self._root.following = self._root
        self._owned: set[Node] = set()

    @property
    def nodes(self) -> Iterator[Node]:
        """All nodes in order. Nodes may be inserted, replaced and erased while iterating."""
        node = self._root.following
        while node is not None and node is not self._root:
            following = node.following
            yield node
            node = node.following if node in self._owned else following

    def __len__(self) -> int:
        return len(self._owned)

    def __contains__(self, node: Node) -> bool:
        return node in self._owned

    def nodes_named(self, *ops: str) -> list[Node]:
        """The nodes whose operation is one of ``ops``, in order."""
        return [node for node in self.nodes if node.op.name in ops]

    def add_input(self, name: str, type: TensorType) -> Value:
        value = Value(name, type)
        self.inputs[name] = value
        return value

    def add_param(
        self,
        name: str,
        expr: Expr,
        storage: torch.dtype | None = None,
        *,
        dtype: torch.dtype | None = None,
        aliases: tuple[str, ...] = (),
        persistent: bool = True,
    ) -> Param:
        """Bind a new parameter. ``dtype`` is the compute dtype; floating weights compute in float32 by default."""
        if name in self.params:
            raise ValueError(f"parameter {name} exists")
        compute = dtype or (torch.float32 if expr.type.dtype.is_floating_point else expr.type.dtype)
        param = Param(
            name,
            expr.type.with_dtype(compute),
            expr=expr,
            storage=storage or expr.type.dtype,
            aliases=aliases,
            persistent=persistent,
        )
        self.params[name] = param
        return param

    def append(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: Mapping[str, Any] | None = None,
        *,
        scope: str = "",
        before: Node | None = None,
        names: Sequence[str] = (),
    ) -> Node:
        """Create a node (at the end, or before ``before``) with inferred output types.

        Raises OpError when an attribute is unknown or the operation does not accept these inputs.
        """
        definition = op_named(op)
        trimmed = list(inputs)
        while trimmed and trimmed[-1] is None:
            trimmed.pop()
        kept = definition.normalise_attrs(attrs or {})
        types = definition.infer_types([None if v is None else v.type for v in trimmed], kept, scope)
        node = Node(definition, trimmed, kept, [], scope)
        node.outputs = [Value(names[i] if i < len(names) else "", type, node=node) for i, type in enumerate(types)]
        for value in trimmed:
            _add_use(value, node)
        self._link(node, before or self._root)
        return node

    def op(
        self,
        op: str,
        inputs: Sequence[Value | None],
        attrs: Mapping[str, Any] | None = None,
        *,
        scope: str = "",
        before: Node | None = None,
    ) -> Value:
        """``append`` for an operation with one output: returns that output."""
        return self.append(op, inputs, attrs, scope=scope, before=before).output

    def set_input(self, node: Node, index: int, value: Value | None) -> None:
        """Make input ``index`` of ``node`` read ``value``."""
        _remove_use(node.inputs[index], node)
        node.inputs[index] = value
        _add_use(value, node)

    def replace(self, old: Value, new: Value) -> None:
        """Make every user of ``old``, and every graph output that is ``old``, read ``new``."""
        for node in list(old.users):
            for index, value in enumerate(node.inputs):
                if value is old:
                    self.set_input(node, index, new)
        for name, value in self.outputs.items():
            if value is old:
                self.outputs[name] = new

    def erase(self, node: Node) -> None:
        """Remove a node that nobody uses."""
        if any(output.users for output in node.outputs):
            raise ValueError(f"{node.op.name} in {node.scope} still has users")
        for value in node.inputs:
            _remove_use(value, node)
        assert node.previous is not None and node.following is not None  # linked nodes always have neighbours
        node.previous.following, node.following.previous = node.following, node.previous
        self._owned.discard(node)

    def move_before(self, node: Node, anchor: Node) -> None:
        """Move a node in front of another one."""
        assert node.previous is not None and node.following is not None
        node.previous.following, node.following.previous = node.following, node.previous
        self._link(node, anchor)

    def to_torch(self, *, device: torch.device | str = "cpu") -> GraphModule:
        """A torch module that computes this graph; see ``compiler.ir.execute.to_torch``."""
        from compiler.ir.execute import to_torch

        return to_torch(self, device=device)

    def prune(self) -> int:
        """Erase nodes and parameters that no output depends on. Returns how many were erased."""
        kept = {id(value) for value in self.outputs.values()}
        erased = 0
        for node in reversed(list(self.nodes)):
            if not any(output.users or id(output) in kept for output in node.outputs):
                self.erase(node)
                erased += 1
        for name, param in list(self.params.items()):
            if not param.users and id(param) not in kept:
                del self.params[name]
                erased += 1
        return erased

    def _link(self, node: Node, anchor: Node) -> None:
        previous = anchor.previous
        assert previous is not None
        previous.following, node.previous = node, previous
        node.following, anchor.previous = anchor, node
        self._owned.add(node)


def _add_use(value: Value | None, node: Node) -> None:
    if value is not None:
        value.users[node] = value.users.get(node, 0) + 1


def _remove_use(value: Value | None, node: Node) -> None:
    if value is None:
        return
    value.users[node] -= 1
    if not value.users[node]:
        del value.users[node]


def ancestors(values: Iterable[Value]) -> list[Node]:
    """Every node that ``values`` depend on, in no particular order."""
    pending = [value.node for value in values if value.node is not None]
    seen: dict[Node, None] = {}
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen[node] = None
        pending += [value.node for value in node.inputs if value is not None and value.node is not None]
    return list(seen)
