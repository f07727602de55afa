"""Calibration windows: those to train on, in batches and in a fixed order, and those held out to judge by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compiler.calibration.fidelity import positions
from compiler.errors import PassError
from compiler.ir.graph import Graph

Batch = Mapping[str, Tensor]

HELD_EVERY = 8
HELD_MOST = 8
STEP_TOKENS = 1024


@dataclass(frozen=True)
class Windows:
    """``train`` and ``held`` have no window in common."""

    train: list[Batch]
    held: list[Batch]


def divide(batches: Sequence[Batch]) -> Windows:
    """Hold out one window in eight, evenly spaced, at most 8. Raises PassError when there are fewer than two."""
    if len(batches) < 2:
        raise PassError(
            "training needs two windows of calibration data: one to train on and one to judge by",
            remedy="raise `samples` of `calibration`",
        )
    step = max(HELD_EVERY, len(batches) // HELD_MOST)
    held = {index for index in range(len(batches)) if index % step == min(step, len(batches)) - 1}
    held = set(sorted(held)[:HELD_MOST])
    return Windows(
        [batch for index, batch in enumerate(batches) if index not in held], [batches[index] for index in sorted(held)]
    )


def tokens(batch: Batch) -> int:
    """How many positions a window has, over all its samples."""
    return positions(batch)


def merged(graph: Graph, batches: Sequence[Batch], most: int) -> list[Batch]:
    """As many windows in a batch as have ``most`` tokens, where the graph takes any number and they are alike."""
    size = max(1, most // tokens(batches[0]))
    size = size if all(isinstance(value.shape[0], str) for value in graph.inputs.values()) else 1
    groups: list[list[Batch]] = []
    for batch in batches:
        if groups and len(groups[-1]) < size and _alike(groups[-1][0], batch):
            groups[-1].append(batch)
        else:
            groups.append([batch])
    return [{name: torch.cat([batch[name] for batch in group]) for name in group[0]} for group in groups]


def _alike(one: Batch, other: Batch) -> bool:
    return all(one[name].shape[1:] == other[name].shape[1:] for name in one)


def order(count: int, length: int, seed: int) -> list[int]:
    """``length`` numbers below ``count``: each comes once before any comes again, shuffled anew every time."""
    source = torch.Generator().manual_seed(seed)
    rounds = (torch.randperm(count, generator=source).tolist() for _ in range(-(-length // count)))
    return [index for numbers in rounds for index in numbers][:length]
