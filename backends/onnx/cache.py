"""What a model keeps of past tokens: inputs and outputs beside those of the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from compiler.ir.graph import Node, Value
from compiler.ir.types import Dim

if TYPE_CHECKING:
    from backends.onnx.builder import Builder

ATTENTION = ("attention", "latent_attention")
PAST, PRESENT = "past_key_values", "present"
PAST_AXIS, TOTAL_AXIS = "past_sequence", "total_sequence"


@dataclass
class Cache:
    """The cached tensors by name (``0.key``), in the order of layers. ``slots`` numbers attentions by what they cache:
    those that share keys share a slot."""

    build: Builder
    tokens: Dim
    part: str = ""
    slots: dict[tuple[Value | None, ...], int] = field(default_factory=dict[tuple["Value | None", ...], int])
    past: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])
    present: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])

    def holds(self, node: Node) -> bool:
        """Whether ``node`` attends to past tokens, too."""
        axis = 1 if node.op.name == "latent_attention" else 2
        return bool(node.attr("causal")) and node.input(1).shape[axis] == self.tokens

    def name(self, node: Node, what: str) -> str:
        """What a cached tensor of ``node`` is called: ``3.key``."""
        key = tuple(node.inputs[1:3])
        return f"{self.slots.setdefault(key, len(self.slots))}{self.part}.{what}"

    def entry(self, name: str, heads: Dim, width: Dim, kind: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """The input [B, heads, past tokens, width] of numbers of ``kind`` for past tokens."""
        if name not in self.past:
            shape = ir.Shape(["batch", heads, PAST_AXIS, width])
            self.past[name] = ir.Value(name=f"{PAST}.{name}", type=ir.TensorType(kind), shape=shape)
        return self.past[name]

    def leave(self, name: str, value: ir.Value) -> None:
        """Make ``value`` the output for all tokens there are now."""
        entry = self.past[name]
        assert entry.shape is not None  # entries are made with one
        value.name = f"{PRESENT}.{name}"
        value.type = entry.type
        value.shape = ir.Shape([entry.shape[0], entry.shape[1], TOTAL_AXIS, entry.shape[3]])
        self.present[name] = value

    def extended(self, node: Node, what: str, new: ir.Value, heads: Dim, width: Dim) -> ir.Value:
        """Past tokens' tensor joined with that of new ones, [B, heads, S, width]."""
        name = self.name(node, what)
        if name not in self.present:
            past = self.entry(name, heads, width)
            self.leave(name, self.build.op("Concat", past, new, axis=2))
        return self.present[name]

    @property
    def inputs(self) -> Sequence[ir.Value]:
        return list(self.past.values())

    @property
    def outputs(self) -> Sequence[ir.Value]:
        return list(self.present.values())
