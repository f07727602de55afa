"""A small gate that learns which tokens matter: what it adds to the logarithm of the attention that each gets.

Before it is trained it adds nothing: its halves are the same, and their results are subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.ir.graph import Graph, Node, Param, Value
from compiler.ir.sites import static
from compiler.weights.expr import Expr
from passes.drop_tokens.places import Place
from passes.drop_tokens.scores import Ops

HIDDEN = 32  # of each half
LEAST = 1e-9  # attention that a token may get, so that it has a logarithm
EPS = 1e-6
NAME = "token_gate"
LAYERS = 1 << 16  # more than a stack has


@dataclass(frozen=True)
class Gate:
    """Matrices [2 h, D] and [1, 2 h] of the gate behind ``place``."""

    inner: Param
    outer: Param

    def scores(self, ops: Ops, stream: Value, attention: Value) -> Value:
        """[B, T] of the tokens of ``stream`` [B, T, D], of the ``attention`` [B, T] that they get."""
        own = Ops(ops.graph, f"{ops.scope}.{NAME}", ops.anchor)
        unit = own("rms_norm", stream, eps=EPS)
        hidden = own("gelu", own("linear", unit, self.inner))
        learnt = own("mean", own("linear", hidden, self.outer), axes=(2,))
        return own("add", own("log", own("add", attention, scalar=LEAST)), learnt)


def add_gate(graph: Graph, spill: Callable[[str, Tensor], Expr], place: Place, seed: int) -> Gate:
    """Give ``graph`` the weights of a gate that adds nothing yet, the same for the same layer and ``seed``."""
    name, width = f"{place.layer.scope}.{NAME}", static(place.stream.shape[2])
    source = torch.Generator().manual_seed(seed * LAYERS + place.layer.index)
    inner = torch.randn(HIDDEN, width, generator=source) / width**0.5
    outer = torch.randn(1, HIDDEN, generator=source) / HIDDEN**0.5
    parts = {"inner.weight": torch.cat((inner, inner)), "outer.weight": torch.cat((outer, -outer), 1)}
    names = {part: f"{name}.{part}" for part in parts}
    return Gate(*(graph.add_param(names[part], spill(names[part], value)) for part, value in parts.items()))


def remove_gates(graph: Graph) -> None:
    """Let the attention that tokens get be what they score by."""
    for node in graph.nodes_named("add"):
        if node.scope.endswith(f".{NAME}") and len(node.inputs) == 2:
            graph.replace(node.output, _attention(node))
    graph.prune()


def _attention(node: Node) -> Value:
    """What is behind the logarithm that ``node`` adds to."""
    value = node.input(0)
    for name in ("log", "add"):
        assert value.node is not None and value.node.op.name == name  # as `scores` made it
        value = value.node.input(0)
    return value
