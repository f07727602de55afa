"""perplexity-by-position: whether a long context still helps, read through the live cache as in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from compiler.evaluate.estimates import Array, ratio
from compiler.evaluate.metrics.base import Given, Row, Task, stacked
from compiler.evaluate.metrics.divergence import bucketed
from compiler.evaluate.reader import PIECE, Reader


def window_losses(model: Any, ids: Tensor) -> Tensor:
    """Losses in nats of the tokens of ``ids`` [length] but the first, [length - 1], read in pieces of 512."""
    reader, found = Reader(model), list[Tensor]()
    for piece in ids.split(PIECE):
        targets = ids[reader.length + 1 : reader.length + len(piece) + 1]
        found.append(functional.cross_entropy(reader.read(piece)[: len(targets)], targets, reduction="none"))
    return torch.cat(found)


def losses_by_position(losses: Tensor) -> dict[str, Row]:
    """Sums and counts of ``losses``, which begin with that of the second token: 1 to 128, 129 to 256, and so on."""
    return bucketed(losses.double(), 1)


def _observe(model: Any, given: Given) -> list[Mapping[str, Row]]:
    return [losses_by_position(window_losses(model, window.ids)) for window in given.windows if window.ids is not None]


def _score(ours: Sequence[Any], theirs: Sequence[Any] | None) -> Mapping[str, Array]:
    return stacked(ours)


PERPLEXITY_BY_POSITION = Task(_observe, _score, "causal", "text", statistic=ratio(np.exp))
