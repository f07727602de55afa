"""What a model keeps of past tokens: inputs and outputs beside those of the graph.

Where prompts lose tokens behind some layers, each stage of layers keeps its own ones, and their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch

from backends.onnx.target import SCATTER
from compiler.ir.graph import Node, Value
from compiler.ir.types import Dim

if TYPE_CHECKING:
    from backends.onnx.builder import Builder

ATTENTION = ("attention", "latent_attention")
PAST, PRESENT = "past_key_values", "present"
PAST_AXIS, TOTAL_AXIS, ROOM_AXIS = "past_sequence", "total_sequence", "capacity"


def stage_name(number: int) -> str:
    """What the stage ``number`` of those with fewer tokens is called."""
    return f"stage{number + 1}"


def places_name(number: int) -> str:
    """What the positions of its tokens are called."""
    return f"{stage_name(number)}.positions"


def _total(axis: str) -> str:
    return axis.replace(PAST_AXIS, TOTAL_AXIS)


@dataclass
class Cache:
    """The cached tensors by name (``0.key``), in the order of layers. ``slots`` numbers attentions by what they cache:
    those that share keys share a slot. ``stages`` are the dims of new tokens of stages with fewer of them."""

    build: Builder
    tokens: Dim
    part: str = ""
    stages: Sequence[Dim] = ()
    slots: dict[tuple[Value | None, ...], int] = field(default_factory=dict[tuple["Value | None", ...], int])
    past: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])
    present: dict[str, ir.Value] = field(default_factory=dict[str, ir.Value])

    def holds(self, node: Node) -> bool:
        """Whether ``node`` attends to past tokens, too."""
        return bool(node.attr("causal")) and self.new(node) in (self.tokens, *self.stages)

    def new(self, node: Node) -> Dim:
        """How many keys of its own ``node`` has."""
        return node.input(1).shape[1 if node.op.name == "latent_attention" else 2]

    def axis(self, tokens: Dim, axis: str) -> str:
        """What ``axis`` is called in the stage that has so many new ``tokens``."""
        return f"{stage_name(self.stages.index(tokens))}_{axis}" if tokens in self.stages else axis

    def name(self, node: Node, what: str) -> str:
        """What a cached tensor of ``node`` is called: ``3.key``."""
        key = tuple(node.inputs[1:3])
        return f"{self.slots.setdefault(key, len(self.slots))}{self.part}.{what}"

    def entry(
        self, name: str, heads: Dim, width: Dim, kind: ir.DataType | None = None, *, past: str = PAST_AXIS
    ) -> ir.Value:
        """The input [B, heads, past tokens, width] of numbers of ``kind`` for past tokens, whose axis is ``past``."""
        return self._entry(name, ["batch", heads, past, width], kind or self.build.kind(torch.float32))

    def _entry(self, name: str, shape: Sequence[Dim], kind: ir.DataType) -> ir.Value:
        if name not in self.past:
            self.past[name] = ir.Value(name=f"{PAST}.{name}", type=ir.TensorType(kind), shape=ir.Shape(shape))
        return self.past[name]

    def leave(self, name: str, value: ir.Value) -> None:
        """Make ``value`` the output for all tokens there are now."""
        entry = self.past[name]
        assert entry.shape is not None  # entries are made with one
        value.name = f"{PRESENT}.{name}"
        value.type = entry.type
        value.shape = ir.Shape([dim if isinstance(dim, int) else _total(str(dim.value)) for dim in entry.shape])
        self.present[name] = value

    def places(self, tokens: Dim) -> ir.Value:
        """The input [B, past tokens] for the positions of past tokens of a stage, less than 0 for padding."""
        shape: list[Dim] = ["batch", self.axis(tokens, PAST_AXIS)]
        return self._entry(places_name(self.stages.index(tokens)), shape, ir.DataType.INT64)

    def extended(self, node: Node, what: str, new: ir.Value, heads: Dim, width: Dim) -> ir.Value:
        """Past tokens' tensor joined with that of new ones, [B, heads, S, width]."""
        name = self.name(node, what)
        if name not in self.present:
            past = self.entry(name, heads, width, past=self.axis(self.new(node), PAST_AXIS))
            self.leave(name, self.build.op("Concat", past, new, axis=2))
        return self.present[name]

    def written(self, node: Node, what: str, new: ir.Value, width: Dim) -> ir.Value:
        """A buffer [B, 1, capacity, width] with new tokens' tensors behind past tokens'. There is room for all of them;
        what lies behind is masked."""
        name, build = self.name(node, what), self.build
        if name not in self.present:
            past = self.entry(name, 1, width, past=ROOM_AXIS)
            if build.masks.room is None:
                build.masks.room = build.op("Shape", past, start=2, end=3)
            if "first" not in build.shared:
                batch = build.op("Shape", build.masks.given, start=0, end=1)
                build.shared["first"] = (build.op("Expand", build.masks.first_column(), batch),)
            self.leave(name, build.op(SCATTER, past, new, build.shared["first"][0], axis=2))
        return self.present[name]

    @property
    def inputs(self) -> Sequence[ir.Value]:
        return list(self.past.values())

    @property
    def outputs(self) -> Sequence[ir.Value]:
        return list(self.present.values())
