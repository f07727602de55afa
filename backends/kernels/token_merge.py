"""Tokens that others were merged into: means by weight, where a token that stands for several counts as often.

    total[k] = weight[index[k]] + Σ_{into[r] = k} weight[rest[r]]
    merged[k] = (weight[index[k]] · x[index[k]] + Σ_{into[r] = k} weight[rest[r]] · x[rest[r]]) / total[k]

One program makes one token: it looks for its number in ``into`` and adds what it finds in that order, so that there
are no atomic additions and the result is the same each time. Bytes moved: x once, the result once, ``into`` for every
token from the cache.
Source: Bolya et al., Token Merging, 2023 (arXiv 2210.09461).
"""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

from .launch import Launch, Plan, first_reason, jit, operation, power_of_two, tl

# Widest token -> warps that share it.
WARPS = {512: 2, 2048: 4, 16384: 8}
MOST = 8192  # tokens that are merged


def reference(x: Tensor, weight: Tensor, index: Tensor, rest: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens [B, K, D] in the dtype of ``x`` [B, T, D], and their weights [B, K] in that of ``weight`` [B, T].

    ``index`` int64 [B, K] are the places of those that remain, ``rest`` [B, R] of those that go ``into`` the K.
    """
    wide = weight.float()
    weighed = x.float() * wide[..., None]
    total = wide.gather(1, index).scatter_add(1, into, wide.gather(1, rest))
    merged = weighed.gather(1, _rows(index, x)).scatter_add(1, _rows(into, x), weighed.gather(1, _rows(rest, x)))
    return (merged / total[..., None]).to(x.dtype), total.to(weight.dtype)


def _rows(places: Tensor, x: Tensor) -> Tensor:
    return places[..., None].expand(-1, -1, x.shape[-1])


@jit
def _token_merge(
    x, weight, index, rest, into, merged, totals, tokens, kept, rests, size, WIDTH: tl.constexpr, RESTS: tl.constexpr
):
    slot, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column, entry = tl.arange(0, WIDTH), tl.arange(0, RESTS)
    inside = column < size
    own = tl.load(index + batch * kept + slot)
    total = tl.load(weight + batch * tokens + own).to(tl.float32)
    row = tl.load(x + (batch * tokens + own) * size + column, mask=inside, other=0.0).to(tl.float32)
    mixed = row * total
    goes = tl.load(into + batch * rests + entry, mask=entry < rests, other=-1) == slot
    at = tl.min(tl.where(goes, entry, rests))
    while at < rests:
        place = tl.load(rest + batch * rests + at)
        part = tl.load(weight + batch * tokens + place).to(tl.float32)
        row = tl.load(x + (batch * tokens + place) * size + column, mask=inside, other=0.0).to(tl.float32)
        mixed += row * part
        total += part
        at = tl.min(tl.where(goes & (entry > at), entry, rests))
    result = (mixed / total).to(merged.dtype.element_ty)
    tl.store(merged + (batch * kept + slot) * size + column, result, mask=inside)
    tl.store(totals + batch * kept + slot, total.to(totals.dtype.element_ty))


def outside(x: Tensor, weight: Tensor, index: Tensor, rest: Tensor, into: Tensor) -> str | None:
    """Why the inputs are not for the kernel."""
    return first_reason(
        [
            (x.dtype in (torch.float32, torch.float16, torch.bfloat16), f"{x.dtype} is no dtype of activations"),
            (weight.is_floating_point() and weight.dtype != torch.float64, f"{weight.dtype} is no dtype of weights"),
            (x.shape[-1] <= max(WARPS), f"tokens of {x.shape[-1]} elements do not stay in registers"),
            (rest.shape[1] <= MOST, f"{rest.shape[1]} merged tokens are more than {MOST}"),
        ]
    )


def plan(x: Tensor, weight: Tensor, index: Tensor, rest: Tensor, into: Tensor) -> Plan:
    """One program a token."""
    batch, tokens, size = x.shape
    merged, totals = _shaped(x, weight, index, rest, into)
    arguments = {
        "x": x.contiguous(),
        "weight": weight.contiguous(),
        "index": index.contiguous(),
        "rest": rest.contiguous(),
        "into": into.contiguous(),
        "merged": merged,
        "totals": totals,
        "tokens": tokens,
        "kept": index.shape[1],
        "rests": rest.shape[1],
        "size": size,
    }
    constants = {"WIDTH": power_of_two(size), "RESTS": power_of_two(rest.shape[1])}
    warps = next(count for widest, count in WARPS.items() if size <= widest)
    return Plan((merged, totals), [Launch(_token_merge, (index.shape[1], batch), arguments, constants, warps)])


def token_merge(x: Tensor, weight: Tensor, index: Tensor, rest: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    """Merged tokens and their weights, as ``reference`` says."""
    return reference(x, weight, index, rest, into)


def _shaped(x: Tensor, weight: Tensor, index: Tensor, rest: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(*index.shape, x.shape[-1]), weight.new_empty(index.shape)


token_merge = operation(token_merge, reference, plan, outside, _shaped)
