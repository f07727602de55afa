"""Patches of pictures as words: those of a picture that are the same word become one token.

A vocabulary is found by spherical k-means on calibration pictures, of what patches have beyond the mean at their place
(Visual Word Tokenizer, arXiv 2411.15397, whose patches have no places yet). It has as many words as tokens that may
remain, so that a picture always has as many that repeat a word as are to go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compiler.errors import PassError
from compiler.ir.execute import bind_dims, run_nodes
from compiler.ir.graph import Graph, Value, ancestors
from compiler.ir.sites import static
from compiler.pipeline import Context
from compiler.weights.ops.basic import literal
from passes.drop_tokens.places import Place
from passes.drop_tokens.scores import Ops

NAME = "token_words"
ROUNDS = 10
EPS = 1e-6
HIGH = 1e30
"""What tokens score that are not the second of a word: more than any other."""


@dataclass(frozen=True)
class Words:
    """``word`` int64 [B, T] is a number for each token, that of the first ``prefix`` and last ``suffix`` theirs alone,
    and ``near`` [B, T] how like their word they are."""

    word: Value
    near: Value

    def chosen(self, ops: Ops, keep: int, prefix: int, suffix: int) -> tuple[Value, Value, Value]:
        """The places [B, keep] of the tokens that remain, those [B, R] of the others, and which of those that remain
        each goes into: the first of its word. Those go that are most like their words."""
        batch, tokens = self.word.shape
        shapes = (batch, tokens, 1), (batch, 1, tokens)
        same = ops("compare", *(ops("reshape", self.word, shape=shape) for shape in shapes), relation="eq")
        first = ops("argmax", ops("cast", same, dtype=torch.float32), axis=2)
        again = ops("compare", first, ops("reshape", ops("arange", stop=tokens), shape=(1, tokens)), relation="lt")
        most = ops("full", shape=(batch, tokens), value=HIGH)
        score = ops("where", again, ops("neg", self.near), most)
        index, rest = ops.all("token_select", score, keep=keep, prefix=prefix, suffix=suffix)
        none, one = (ops("full", shape=(batch, count, 1), value=value) for count, value in ((tokens, 0.0), (keep, 1.0)))
        remains = ops("reshape", ops("token_restore", none, one, index), shape=(batch, tokens))
        before = ops("sub", ops("cumsum", remains, axis=1), scalar=1.0)
        slots = ops("cast", ops("token_take", before, first), dtype=torch.int64)
        return index, rest, ops("token_take", slots, rest)


def words(
    ops: Ops, ctx: Context, place: Place, metric: Value, inner: slice, count: int, learn: int, seed: int
) -> Words:
    """The words of ``metric`` [B, T, d], of which those of ``inner`` tokens are ``count``; found from ``learn`` tokens
    of calibration data. Raises PassError where there are fewer of these than words."""
    graph, (tokens, width) = ops.graph, (static(dim) for dim in metric.shape[1:])
    mean, vocabulary = torch.zeros(tokens, width), torch.ones(count, width)
    batches = ctx.calibration()
    if not ctx.planned:
        mean, vocabulary = _learnt(_observed(graph, metric, batches, learn), inner, count, seed)
    name = f"{place.layer.scope}.{NAME}"
    parts = {"mean": mean, "vocabulary": vocabulary}
    params = [graph.add_param(f"{name}.{part}", ctx.spill(f"{name}.{part}", own)) for part, own in parts.items()]
    own = Ops(graph, name, ops.anchor)
    near = own("linear", own("rms_norm", own("sub", metric, params[0]), eps=EPS), params[1])
    alone = [0 if number in range(tokens)[inner] else count + number for number in range(tokens)]
    ends = graph.add_param(f"{name}.ends", literal(alone, (1, tokens), torch.int64), persistent=False)
    return Words(own("add", own("argmax", near, axis=2), ends), own("max", near, axes=(2,)))


def _observed(graph: Graph, value: Value, batches: Sequence[Mapping[str, Tensor]], count: int) -> Tensor:
    """``value`` [N, T, d] of calibration data, of about ``count`` tokens."""
    needed = set(ancestors([value]))
    nodes = [node for node in graph.nodes if node in needed]
    found: list[Tensor] = []
    for batch in batches:
        values = {graph.inputs[name]: tensor for name, tensor in batch.items()}
        with torch.no_grad():
            run_nodes(graph, nodes, values, bind_dims(graph, batch), keep=[value])
        found.append(values[value].float())
        if sum(each.shape[0] * each.shape[1] for each in found) >= count:
            break
    if not found:
        raise PassError(
            "there are no calibration pictures to find words in",
            option="merge",
            remedy="name a directory of pictures by `calibration: {data: …}`",
        )
    return torch.cat(found)


def _learnt(seen: Tensor, inner: slice, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """The mean [T, d] of ``seen`` [N, T, d], and ``count`` directions [count, d] that ``inner`` tokens are near to."""
    mean = seen.mean(0)
    beyond = (seen - mean)[:, inner].reshape(-1, seen.shape[2])
    rows = F.normalize(beyond[beyond.norm(dim=1) > EPS], dim=-1)
    if len(rows) < count:
        cause = f"{count} words cannot be found in {len(rows)} tokens that differ from the mean of {len(seen)} pictures"
        raise PassError(cause, option="keep", remedy="give more calibration pictures")
    found = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]]
    for _ in range(ROUNDS):
        word = (rows @ found.T).argmax(1)
        total = torch.zeros_like(found).index_add(0, word, rows)
        found = torch.where(total.norm(dim=1, keepdim=True) > EPS, F.normalize(total, dim=-1), found)
    return mean, found
