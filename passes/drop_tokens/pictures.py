"""Which tokens of a text are those of pictures, where a model puts vectors of these in their places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compiler.errors import PassError
from compiler.ir.graph import Graph, Node, Value, ancestors
from compiler.ir.types import Dim, canonical_dim
from passes.drop_tokens.crops import shared
from passes.drop_tokens.places import ends, places
from passes.drop_tokens.scores import Ops

HIGH = 1e30
"""What tokens of the text score: more than any other."""


@dataclass(frozen=True)
class Pictures:
    """``flags`` bool [B, T, 1] hold at the ``count`` tokens of pictures that every sample has, and ``taken`` takes
    vectors of these from those of all samples, one after the other."""

    flags: Value
    count: int
    taken: Node

    def left(self, tokens: Dim, keep: int) -> Dim:
        """How many of ``tokens`` there are with so many of pictures."""
        return canonical_dim(f"({tokens})-{self.count - keep}")

    def protect(self, ops: Ops, scores: Value) -> Value:
        """``scores`` [B, T] of which those of the text are higher than all others."""
        most = ops("full", shape=scores.shape, value=HIGH)
        return ops("where", ops("reshape", self.flags, shape=scores.shape), scores, most)

    def class_scores(self, ops: Ops, crops: Sequence[int]) -> Value:
        """The attention [B, T] that the last class tokens of pictures pay to tokens of these, in their places of the
        text; with ``crops`` shared among the pictures of a sample.

        Raises PassError where no class token, or not one for each of these tokens, is known.
        """
        attention = self._attention(ops)
        batch, length = self.flags.shape[:2]
        pictures = canonical_dim(f"({attention.shape[0]})/({batch})")
        if crops:
            if pictures != crops[0] * crops[1] + 1:
                cause = f"samples have {pictures} pictures and not one and {crops[0] * crops[1]} crops of it"
                raise PassError(cause, option="crops", remedy="capture the model with as many pictures for each text")
            attention = shared(ops, attention, batch, crops)
        column = ops("reshape", attention, shape=(self.taken.input(0).shape[0], 1))
        return ops("reshape", ops("take", column, self.taken.input(1), axis=0), shape=(batch, length))

    def _attention(self, ops: Ops) -> Value:
        """What class tokens attend to, [B * P, N]."""
        place = places(ops.graph, None, "attention")[-1]
        learnt, own = ends(ops.graph, place)[0], place.tokens
        if place.attention not in ancestors([self.taken.input(0)]) or not learnt or not isinstance(own, int):
            raise PassError("pictures have no class token", option="score", remedy="write another `score`")
        per = canonical_dim(f"({self.taken.input(0).shape[0]})/({place.stream.shape[0]})")
        if per not in (own, own - learnt):
            cause = f"{per} tokens of a picture are put into the text, and {place.layer.stack} has {own}"
            raise PassError(cause, option="score", remedy="write another `score`")
        query, key = place.attention.input(0), place.attention.input(1)
        scores = ops("token_scores", query, key, rows="first", scale=place.attention.attr("scale"))
        return ops("slice", scores, axis=1, start=own - per, stop=own)


def pictures(graph: Graph, stream: Value) -> Pictures:
    """The pictures of ``stream`` [B, T, D].

    Raises PassError when it has none, or not as many tokens of them in each sample.
    """
    made = [node for node in ancestors([stream]) if node.op.name == "where" and _is_placed(graph, node, stream)]
    if len(made) != 1:
        raise PassError("no tokens of the layers are those of pictures", option="tokens", remedy="leave it out")
    taken = _taken(made[0])
    count = canonical_dim(f"({taken.input(0).shape[0]})/({stream.shape[0]})")
    if not isinstance(count, int):
        raise PassError(
            "samples have pictures of different numbers of tokens",
            option="tokens",
            remedy="calibrate on pictures of one size",
        )
    return Pictures(made[0].input(0), count, taken)


def _is_placed(graph: Graph, node: Node, stream: Value) -> bool:
    """Whether ``node`` puts what comes of an input of numbers where a flag of each token holds."""
    flags, rows = node.input(0), node.input(1)
    if node.output.shape != stream.shape or flags.shape != (*stream.shape[:2], 1):
        return False
    given = {value for value in graph.inputs.values() if value.type.dtype.is_floating_point}
    return any(value in given for each in ancestors([rows]) for value in each.inputs)


def _taken(node: Node) -> Node:
    """What takes vectors of pictures, of all samples, to their places."""
    taken = [each for each in ancestors([node.input(1)]) if each.op.name == "take" and each.attr("axis") == 0]
    found = [each for each in taken if each.output.shape[-1] == node.output.shape[-1]]
    if not found:
        raise PassError(
            "vectors of pictures are put into the text in an unknown way",
            option="tokens",
            remedy="drop tokens of the vision tower by itself: save it as a model of its own",
        )
    return found[-1]
