"""kl and agreement, over all positions and by position: how far next-token distributions are from the original's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from compiler.evaluate.metrics.base import Metric, Row, Scored

ROWS = 64  # positions whose distributions are held in float64 at once
FIRST = 128

Positions = Callable[[Scored], Tensor]


def divergence(window: Scored) -> Tensor:
    """KL(reference || model) of the next-token distributions, nats, float64 [positions], over the whole vocabulary."""
    parts = zip(window.output.split(ROWS), window.original().split(ROWS), strict=True)
    return torch.cat([_kl(ours, theirs) for ours, theirs in parts])


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(theirs.double(), -1), torch.log_softmax(ours.double(), -1)
    terms = log_p.exp() * (log_p - log_q)
    return terms.masked_fill(log_p == -math.inf, 0).sum(-1)  # what has no probability adds nothing


def same_token(window: Scored) -> Tensor:
    """Whether the most likely token is the same, float64 [positions]."""
    return (window.output.argmax(-1) == window.original().argmax(-1)).double()


def over_all(values: Positions) -> Callable[[Scored], Mapping[str, Row]]:
    """Sum and count of a quantity over the positions of a window."""

    def score(window: Scored) -> Mapping[str, Row]:
        found = values(window)
        return {"": (found.sum().item(), float(len(found)))}

    return score


def by_position(values: Positions) -> Callable[[Scored], Mapping[str, Row]]:
    """The same apart for positions 1 to 128, 129 to 256, 257 to 512, and so on, each twice as long."""
    return lambda window: bucketed(values(window), 0)


def bucketed(values: Tensor, first: int) -> dict[str, Row]:
    """Sums and counts by position of ``values`` [count], which begin at position ``first``, counted from 0."""
    found: dict[str, Row] = {}
    for begin, end in buckets(first + len(values)):  # a label is that of the whole stretch, however long the window
        inside = values[max(begin - first, 0) : max(end - first, 0)]
        if len(inside):
            found[f"{begin + 1} to {end}"] = (inside.sum().item(), float(len(inside)))
    return found


def buckets(length: int) -> Iterator[tuple[int, int]]:
    """Stretches that hold so many positions, from 0: the first of 128, and the others as long as all before them."""
    begin, end = 0, FIRST
    while begin < length:
        yield begin, end
        begin, end = end, 2 * end


KL = Metric(over_all(divergence), "logits")
AGREEMENT = Metric(over_all(same_token), "logits")
KL_BY_POSITION = Metric(by_position(divergence), "logits")
AGREEMENT_BY_POSITION = Metric(by_position(same_token), "logits")
