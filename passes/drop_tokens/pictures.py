"""Which tokens of a text are those of pictures, where a model puts vectors of these in their places."""

from __future__ import annotations

from dataclasses import dataclass

from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Value, ancestors
from compiler.ir.types import Dim, TensorType, canonical_dim
from passes.drop_tokens.scores import Ops

HIGH = 1e30
"""What tokens of the text score: more than any other."""


@dataclass(frozen=True)
class Pictures:
    """``flags`` bool [B, T, 1] hold at the ``count`` tokens of pictures that every sample has."""

    flags: Value
    count: int

    def left(self, tokens: Dim, keep: int) -> Dim:
        """How many of ``tokens`` there are with so many of pictures."""
        return canonical_dim(f"({tokens})-{self.count - keep}")

    def protect(self, ops: Ops, scores: Value) -> Value:
        """``scores`` [B, T] of which those of the text are higher than all others."""
        most = ops("full", shape=scores.shape, value=HIGH)
        return ops("where", ops("reshape", self.flags, shape=scores.shape), scores, most)


def pictures(graph: Graph, stream: Value) -> Pictures:
    """The pictures of ``stream`` [B, T, D].

    Raises PassError when it has none, or not as many tokens of them in each sample.
    """
    made = [node for node in ancestors([stream]) if node.op.name == "where" and _is_placed(graph, node, stream)]
    if len(made) != 1:
        raise PassError("no tokens of the layers are those of pictures", option="tokens", remedy="leave it out")
    count = canonical_dim(f"({_rows(made[0])})/({stream.shape[0]})")
    if not isinstance(count, int):
        raise PassError("samples have pictures of different numbers of tokens", option="tokens")
    return Pictures(made[0].input(0), count)


def _is_placed(graph: Graph, node: Node, stream: Value) -> bool:
    """Whether ``node`` puts what comes of an input of numbers where a flag of each token holds."""
    flags, rows = node.input(0), node.input(1)
    if node.output.shape != stream.shape or flags.shape != (*stream.shape[:2], 1):
        return False
    given = {value for value in graph.inputs.values() if value.type.dtype.is_floating_point}
    return any(value in given for each in ancestors([rows]) for value in each.inputs)


def _rows(node: Node) -> Dim:
    """How many vectors of pictures there are, of all samples."""
    taken = [each for each in ancestors([node.input(1)]) if each.op.name == "take" and each.attr("axis") == 0]
    types: list[TensorType] = [each.input(0).type for each in taken if each.output.shape[-1] == node.output.shape[-1]]
    if not types:
        raise PassError("vectors of pictures are put into the text in an unknown way", option="tokens")
    return types[-1].shape[0]
