"""How one operation becomes ONNX nodes, and which attributes that takes care of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from backends.onnx.builder import Builder
from compiler.ir.graph import Node

Emit = Callable[[Builder, Node], ir.Value | Sequence[ir.Value]]


@dataclass(frozen=True)
class Rule:
    """``emit`` appends the nodes for one operation and gives its results; ``attrs`` are all attributes it obeys."""

    op: str
    emit: Emit
    attrs: frozenset[str] = frozenset()


def rule(op: str, *attrs: str) -> Callable[[Emit], Rule]:
    """``@rule("cumsum", "axis")`` makes a function the rule for an operation."""

    def wrap(emit: Emit) -> Rule:
        return Rule(op, emit, frozenset(attrs))

    return wrap


def simple(op: str, name: str) -> Rule:
    """An operation that ONNX has under the name ``name``, with the same operands and no attributes."""

    def emit(build: Builder, node: Node) -> ir.Value:
        return build.op(name, *(build.value(value) for value in node.inputs if value is not None))

    return Rule(op, emit)
