"""Tokens that calibration data hardly holds go: rows of embeddings and heads, and what the tokenizer knows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.allocate import numbers_left
from compiler.errors import PassError
from compiler.ir.facts import parameter_count
from compiler.ir.graph import Graph
from compiler.pipeline import Context
from compiler.rewrite.vocabulary import Vocabulary, keep_tokens, vocabulary_of
from compiler.weights.checkpoint import Checkpoint
from compiler.weights.tokens import Tokens, tokens_of

if TYPE_CHECKING:
    from passes.prune import Prune


def shorten(graph: Graph, ctx: Context, wanted: Prune) -> None:
    """Leave of the tokens the most frequent ones, as many as ``wanted`` says. Raises PassError when some must stay."""
    found = vocabulary_of(graph)
    tokens, count = _tokens(graph, found), _count(graph, wanted, found)
    seen = _occurrences(ctx.calibration(), next(iter(graph.inputs)), found.size)
    kept = list(range(count)) if ctx.planned else chosen(tokens, seen, count)
    _report(ctx, found, kept, seen)
    keep_tokens(graph, found, kept)


def chosen(tokens: Tokens, seen: Tensor, count: int) -> list[int]:
    """The tokens that stay, in order: needed ones, then by ``seen`` [tokens], each with what it is merged from.

    Raises PassError when more than ``count`` are needed.
    """
    kept = {part for token in tokens.needed if token < len(seen) for part in tokens.with_parts(token)}
    if len(kept) > count:
        raise PassError(
            f"{len(kept)} tokens must stay, which texts are cut into or the model is told of",
            option="keep",
            remedy=f"keep more than {len(kept)} of {len(seen)}",
        )
    ranks = torch.where(torch.arange(len(seen)) < tokens.count, seen, -1)  # rows that no token has go first
    for token in ranks.argsort(descending=True, stable=True).tolist():
        more = tokens.with_parts(token) - kept
        if len(kept) + len(more) <= count:
            kept |= more
        if len(kept) == count:
            break
    return sorted(kept)


def _tokens(graph: Graph, found: Vocabulary) -> Tokens:
    """What the tokenizer says of its tokens; of a model without one all are alike."""
    source = graph.sources.get("model")
    return tokens_of(source) if isinstance(source, Checkpoint) else Tokens(found.size, frozenset())


def _count(graph: Graph, wanted: Prune, found: Vocabulary) -> int:
    """How many tokens remain: a multiple of `align`. Raises PassError when there are not so many, or none."""
    rows, whole = sum(param.type.numel for param in found.params), parameter_count(graph)
    part = numbers_left(wanted.keep, rows, whole, wanted.of) / rows * found.size
    count = int(wanted.keep) if wanted.keep > 1 else int(part) // wanted.align * wanted.align
    if not 0 < count <= found.size:
        raise PassError(
            f"{count} tokens cannot remain of {found.size}",
            option="keep",
            remedy="keep a part, or a number of tokens that the model has",
        )
    return count


def _occurrences(batches: Sequence[Mapping[str, Tensor]], name: str, size: int) -> Tensor:
    """How often each of ``size`` tokens occurs, int64."""
    counts = torch.zeros(size, dtype=torch.int64)
    for batch in batches:
        counts += batch[name].flatten().bincount(minlength=size)
    return counts


def _report(ctx: Context, found: Vocabulary, kept: Sequence[int], seen: Tensor) -> None:
    """What of the calibration data's tokens still stands for itself is in the report."""
    known = float(seen[list(kept)].sum() / seen.sum().clamp_min(1))
    for param in found.params:
        row = param.type.numel // found.size
        numbers = {"kept": len(kept), "parameters_before": row * found.size, "parameters_after": row * len(kept)}
        ctx.rewrote(param.name, f"{len(kept)} of {found.size} tokens", **numbers, calibration_kept=known)
