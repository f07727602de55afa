"""Which tokens are merged into which others: bipartite soft matching.

Between the first ``prefix`` and the last ``suffix`` tokens, each odd one is compared with all even ones by the cosine
of their metrics; the T - ``keep`` that are most like an even one go into it. Of equals the first counts. Three
launches: the best partner of each source, over tiles of products of which none is kept; how many sources are better;
which places remain, and where. Bytes moved: metrics once for each tile of sources, places once.
Source: Bolya et al., Token Merging, 2023 (arXiv 2210.09461), section 3.
"""

# pyright: basic, reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import INTERPRETED, Launch, Plan, ceil_div, first_reason, jit, operation, tl

COMPARED = 64  # numbers of a program that counts, and of a step of it


class Tile(NamedTuple):
    """Odd and even tokens of a product, elements of a step of it."""

    sources: int
    others: int
    elements: int
    warps: int
    stages: int


# Most elements of a metric -> tile.
TILES = {1 << 30: Tile(64, 64, 64, 8, 2)}


def reference(metric: Tensor, keep: int, prefix: int = 0, suffix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Of ``metric`` [B, T, d]: the places int64 [B, keep] of those that remain, ascending; the places [B, T - keep] of
    those that are merged, the most alike first; and which of the ones that remain each goes into."""
    batch, tokens, _ = metric.shape
    pairs = pairs_of(tokens, prefix, suffix)
    unit = F.normalize(metric[:, prefix : max(prefix, tokens - suffix)].float(), dim=-1)
    even = F.pad(unit[:, ::2], (0, 0, 0, int(not pairs)))  # of none there is no best
    alike = unit[:, 1::2] @ even.transpose(1, 2)
    best, partner = alike.amax(-1), alike.argmax(-1)
    source = best.sort(dim=-1, descending=True, stable=True).indices[:, : tokens - keep]
    rest, target = prefix + 2 * source + 1, prefix + 2 * partner.gather(1, source)
    remains = torch.ones(batch, tokens, dtype=torch.int64, device=metric.device).scatter(1, rest, 0)
    index = remains.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
    return index, rest, (remains.cumsum(1) - 1).gather(1, target)


def pairs_of(tokens: int, prefix: int, suffix: int) -> int:
    """How many of ``tokens`` can be merged at once."""
    return max(0, tokens - prefix - suffix) // 2


@jit
def _match(
    metric, best, partner, pairs, evens, prefix, size, batch_step, token_step,
    SOURCES: tl.constexpr, OTHERS: tl.constexpr, ELEMENTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    source = tl.program_id(0) * SOURCES + tl.arange(0, SOURCES)
    element = tl.arange(0, ELEMENTS)
    first = metric + batch * batch_step + prefix * token_step
    highest = tl.full([SOURCES], -float("inf"), tl.float32)
    nearest = tl.zeros([SOURCES], tl.int32)
    for start in range(0, evens, OTHERS):
        other = start + tl.arange(0, OTHERS)
        products = tl.zeros([SOURCES, OTHERS], tl.float32)
        odd_norm = tl.zeros([SOURCES], tl.float32)
        even_norm = tl.zeros([OTHERS], tl.float32)
        for step in range(0, size, ELEMENTS):
            column = step + element
            chosen = (source < pairs)[:, None] & (column < size)[None, :]
            odd = tl.load(first + ((2 * source + 1) * token_step)[:, None] + column[None, :], mask=chosen, other=0.0)
            chosen = (other < evens)[:, None] & (column < size)[None, :]
            even = tl.load(first + (2 * other * token_step)[:, None] + column[None, :], mask=chosen, other=0.0)
            wide_even, wide_odd = even.to(tl.float32), odd.to(tl.float32)
            even_norm += tl.sum(wide_even * wide_even, 1)
            odd_norm += tl.sum(wide_odd * wide_odd, 1)
            if WIDE:
                even, odd = wide_even, wide_odd
            products = tl.dot(odd, tl.trans(even), products, input_precision="ieee")
        products = products / tl.maximum(tl.sqrt(odd_norm), 1e-12)[:, None]
        products = products / tl.maximum(tl.sqrt(even_norm), 1e-12)[None, :]
        products = tl.where((other < evens)[None, :], products, -float("inf"))
        top = tl.max(products, 1)
        place = tl.min(tl.where(products == top[:, None], other[None, :], evens), 1)
        nearest = tl.where(top > highest, place, nearest)
        highest = tl.maximum(top, highest)
    tl.store(best + batch * pairs + source, highest, mask=source < pairs)
    tl.store(partner + batch * pairs + source, nearest, mask=source < pairs)


@jit
def _rank(best, rank, pairs, COMPARED: tl.constexpr):
    row = tl.program_id(1).to(tl.int64) * pairs
    source = tl.program_id(0) * COMPARED + tl.arange(0, COMPARED)
    own = tl.load(best + row + source, mask=source < pairs, other=0.0)
    better = tl.zeros([COMPARED], tl.int32)
    for start in range(0, pairs, COMPARED):
        other = start + tl.arange(0, COMPARED)
        value = tl.load(best + row + other, mask=other < pairs, other=-float("inf"))
        before = (value[None, :] == own[:, None]) & (other[None, :] < source[:, None])
        counted = ((value[None, :] > own[:, None]) | before) & (other < pairs)[None, :]
        better += tl.sum(counted.to(tl.int32), 1)
    tl.store(rank + row + source, better, mask=source < pairs)


@jit
def _place(rank, partner, index, rest, into, pairs, prefix, tokens, merged, COMPARED: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * COMPARED + tl.arange(0, COMPARED)
    source = (token - prefix) // 2
    odd = (token >= prefix) & (source < pairs) & ((token - prefix) % 2 == 1)
    order = tl.load(rank + batch * pairs + source, mask=odd, other=merged)
    target = prefix + 2 * tl.load(partner + batch * pairs + source, mask=odd, other=0)
    gone = tl.zeros([COMPARED], tl.int32)
    gone_before_target = tl.zeros([COMPARED], tl.int32)
    for start in range(0, pairs, COMPARED):
        other = start + tl.arange(0, COMPARED)
        goes = tl.load(rank + batch * pairs + other, mask=other < pairs, other=merged) < merged
        place = tl.where(goes, prefix + 2 * other + 1, tokens)
        gone += tl.sum((place[None, :] < token[:, None]).to(tl.int32), 1)
        gone_before_target += tl.sum((place[None, :] < target[:, None]).to(tl.int32), 1)
    goes = order < merged
    tl.store(index + batch * (tokens - merged) + token - gone, token.to(tl.int64), mask=(token < tokens) & ~goes)
    tl.store(rest + batch * merged + order, token.to(tl.int64), mask=goes)
    tl.store(into + batch * merged + order, (target - gone_before_target).to(tl.int64), mask=goes)


def outside(metric: Tensor, keep: int, prefix: int = 0, suffix: int = 0) -> str | None:
    """Why the inputs are not for the kernel."""
    merged, pairs = metric.shape[1] - keep, pairs_of(metric.shape[1], prefix, suffix)
    return first_reason(
        [
            (
                metric.dtype in (torch.float32, torch.float16, torch.bfloat16),
                f"{metric.dtype} is no dtype of activations",
            ),
            (0 <= merged <= pairs, f"{merged} of {metric.shape[1]} tokens cannot be merged, {pairs} can"),
        ]
    )


def plan(metric: Tensor, keep: int, prefix: int = 0, suffix: int = 0, tile: Tile | None = None) -> Plan:
    """The three launches."""
    batch, tokens, size = metric.shape
    pairs = pairs_of(tokens, prefix, suffix)
    tile = tile or next(found for most, found in TILES.items() if size <= most)
    metric = metric if metric.stride(-1) == 1 else metric.contiguous()
    best = metric.new_empty(batch, pairs, dtype=torch.float32)
    partner, rank = (metric.new_empty(batch, pairs, dtype=torch.int32) for _ in range(2))
    index, rest, into = _shaped(metric, keep, prefix, suffix)
    match = Launch(
        _match,
        (ceil_div(pairs, tile.sources), batch),
        {
            "metric": metric,
            "best": best,
            "partner": partner,
            "pairs": pairs,
            "evens": ceil_div(max(0, tokens - prefix - suffix), 2),
            "prefix": prefix,
            "size": size,
            "batch_step": metric.stride(0),
            "token_step": metric.stride(1),
        },
        {"SOURCES": tile.sources, "OTHERS": tile.others, "ELEMENTS": tile.elements, "WIDE": INTERPRETED},
        tile.warps,
        tile.stages,
    )
    counting = {"COMPARED": COMPARED}
    ranked = {"best": best, "rank": rank, "pairs": pairs}
    placed = {"rank": rank, "partner": partner, "index": index, "rest": rest, "into": into, "pairs": pairs}
    placed |= {"prefix": prefix, "tokens": tokens, "merged": tokens - keep}
    launches = [
        match,
        Launch(_rank, (ceil_div(pairs, COMPARED), batch), ranked, counting),
        Launch(_place, (ceil_div(tokens, COMPARED), batch), placed, counting),
    ]
    return Plan((index, rest, into), launches)


def token_match(metric: Tensor, keep: int, prefix: int = 0, suffix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens remain, which are merged, and into which, as ``reference`` says."""
    return reference(metric, keep, prefix, suffix)


def _shaped(metric: Tensor, keep: int, prefix: int = 0, suffix: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = metric.shape
    index, rest, into = (
        metric.new_empty(batch, count, dtype=torch.int64) for count in (keep, tokens - keep, tokens - keep)
    )
    return index, rest, into


token_match = operation(token_match, reference, plan, outside, _shaped)
