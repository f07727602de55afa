"""Sums over K that are split among programs while there are few blocks: how many splits, and how they are added."""

# pyright: basic
from __future__ import annotations

import torch
from torch import Tensor

from .launch import Launch, ceil_div, gpu_of, jit, tl

BLOCK = 1024
PROGRAMS = 4
"""How many programs of each multiprocessor there should at least be."""


def share_of(steps: int, blocks: int, like: Tensor, splits: int = 0) -> int:
    """How many of ``steps`` each split takes; ``splits`` 0: as many as fill the GPU of ``like``."""
    wanted = splits or PROGRAMS * gpu_of(like).processors // max(blocks, 1)
    return ceil_div(steps, min(max(wanted, 1), steps))


def parts_of(y: Tensor, splits: int) -> Tensor:
    """What splits write: y itself where there is one, scratch float32 [splits, ...] otherwise."""
    return y if splits == 1 else y.new_empty(splits, *y.shape, dtype=torch.float32)


def added(parts: Tensor, y: Tensor) -> list[Launch]:
    """The launch that adds ``parts`` up in order; none where they are y."""
    if parts is y:
        return []
    arguments = {"parts": parts, "y": y, "size": y.numel()}
    return [Launch(_added, (ceil_div(y.numel(), BLOCK),), arguments, {"SPLITS": parts.shape[0], "BLOCK": BLOCK})]


@jit
def _added(parts, y, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(parts + split * tl.cast(size, tl.int64) + place, mask=place < size, other=0.0)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=place < size)
